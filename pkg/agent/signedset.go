package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// ErrLooser says that resources would allow more than those in force, and that too few have signed that.
var ErrLooser = errors.New("looser than what is in force")

// maxTold bounds how many loosenings one refusal tells; the rest are counted.
const maxTold = 10

// signedSets holds what is put to work to what people have signed (invariant 15): whoever writes the directory and has no
// key can only tighten.
type signedSets struct {
	name   string             // of the ResourceSet that the node's own configuration names: sets for other nodes have others
	pinned []policy.PublicKey // of the node's own configuration; they sign the first set, and any later one
	now    func() time.Time   // wall clock
}

// admit gives the set to put to work: one that is nowhere looser than the last one, and for one of the node's name that is signed, with a
// higher version, by as many people as the last one asks for, with keys that the last one knows. last is nil for the first set of the node.
//
// Where resources come one by one, the version may come before what it is the version of: it counts once all that was signed is there.
// Until then the set has the version of the last one, and what is tighter in it counts all the same.
func (s *signedSets) admit(last *policy.Set, offered offer) (*policy.Set, error) {
	looser := policy.Loosenings(last, offered.set)
	if len(looser) == 0 && !offered.piecemeal {
		return offered.set, nil
	}
	err := s.signed(last, offered)
	if err == nil {
		return offered.set, nil
	}
	if offered.piecemeal && last != nil {
		if set := offered.set.WithVersionOf(last); len(policy.Loosenings(last, set)) == 0 {
			return set, nil
		}
	}
	return nil, errors.Join(append([]error{err}, told(looser)...)...)
}

func (s *signedSets) signed(last *policy.Set, offered offer) error {
	next := offered.set
	refuse := func(hint, format string, args ...any) error {
		return &policy.Error{File: offered.signedAt, Msg: "these resources are kept out: " + fmt.Sprintf(format, args...), Hint: hint, Err: ErrLooser}
	}
	if next.Name() != s.name {
		return refuse("sign the set that is meant for this node with `sallyport policy sign`, or write the name into its configuration as policySet",
			"they are the set %q, this node takes %q, and they are looser than what is in force", next.Name(), s.name)
	}
	if next.Version() <= last.Version() {
		return refuse("raise the version of the ResourceSet, and sign it with `sallyport policy sign`",
			"the version %d is not higher than %d, and they are looser than what is in force", next.Version(), last.Version())
	}
	envelope, err := offered.signatures()
	if err != nil {
		return refuse("sign them with `sallyport policy sign`", "they are looser than what is in force, and not signed: %s", oneLine(err.Error()))
	}
	if _, err := grant.VerifyResources(envelope, next, last.Keyrings(), s.pinned, last.Signers(), s.now()); err != nil {
		return refuse("sign them with `sallyport policy sign`", "they are looser than what is in force, and %s", oneLine(err.Error()))
	}
	return nil
}

func told(looser []policy.Loosening) (errs []error) {
	for i, l := range looser {
		if i == maxTold {
			return append(errs, fmt.Errorf("%w: and %d more", ErrLooser, len(looser)-maxTold))
		}
		errs = append(errs, fmt.Errorf("%w: %s", ErrLooser, l))
	}
	return errs
}

func readSignatures(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, grant.MaxEnvelope+1))
}
