package grant

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"regexp"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// ErrChallenge says that a statement does not answer a challenge that the node still waits for.
var ErrChallenge = errors.New("no such challenge")

// nonceSize is the length of a nonce in bytes: nobody guesses one.
const nonceSize = 32

// MaxChallenge is the largest challenge that is looked at, in bytes.
const MaxChallenge = 4 << 10

// Challenge is what a node asks of whoever wants something to begin on it: an answer that was signed for it, here and
// now. It is not signed: the node knows which ones it made.
type Challenge struct {
	Node    string // its name
	Boot    string // id of its boot
	Nonce   string // 32 random bytes in hex
	Expires time.Time
}

type wireChallenge struct {
	Node    string `json:"node"`
	Boot    string `json:"boot"`
	Nonce   string `json:"nonce"`
	Expires string `json:"expires"`
}

// NewChallenge makes one that nobody has seen. expires is by the node's wall clock, for people.
func NewChallenge(node, boot string, expires time.Time) Challenge {
	nonce := make([]byte, nonceSize)
	_, _ = rand.Read(nonce) // it never fails
	return Challenge{Node: node, Boot: boot, Nonce: hex.EncodeToString(nonce), Expires: expires.UTC().Truncate(time.Second)}
}

func (c Challenge) wire() *wireChallenge {
	return &wireChallenge{c.Node, c.Boot, c.Nonce, c.Expires.UTC().Format(time.RFC3339Nano)}
}

func (w *wireChallenge) read(v *validation) Challenge {
	if w == nil {
		return Challenge{}
	}
	return Challenge{w.Node, w.Boot, w.Nonce, v.parseTime("challenge.expires", w.Expires)}
}

// MarshalJSON gives the one form of a challenge.
func (c Challenge) MarshalJSON() ([]byte, error) { return encode(c.wire()) }

// bootPattern holds what /proc/sys/kernel/random/boot_id says, a UUID.
var bootPattern = regexp.MustCompile(`^[0-9A-Za-z-]+$`)

const maxBoot = 64

const challengeHint = "take the challenge as `sallyport grant challenge` wrote it"

// ParseChallenge reads the form of MarshalJSON, but for spaces, strictly.
func ParseChallenge(data []byte) (Challenge, error) {
	if len(data) > MaxChallenge {
		return Challenge{}, refuse("challenge", ErrMalformed, challengeHint, "has %d bytes, the most is %d", len(data), MaxChallenge)
	}
	var w wireChallenge
	if err := decodeStrict("challenge", data, &w); err != nil {
		return Challenge{}, err
	}
	v := &validation{}
	c := w.read(v)
	c.validate(v)
	if err := errors.Join(v.errs...); err != nil {
		return Challenge{}, err
	}
	var compact bytes.Buffer
	if written, err := encode(c.wire()); err != nil || json.Compact(&compact, data) != nil || !bytes.Equal(compact.Bytes(), written) {
		return Challenge{}, refuse("challenge", ErrNotCanonical, challengeHint, "has a key twice, in other letters or with needless escapes")
	}
	return c, nil
}

func (c Challenge) validate(v *validation) {
	v.check("challenge.node", policy.CheckNodeName(c.Node))
	if len(c.Boot) > maxBoot || !bootPattern.MatchString(c.Boot) {
		v.refuse("challenge.boot", challengeHint, "%.80q is not the id of a boot", c.Boot)
	}
	if raw, err := hex.DecodeString(c.Nonce); err != nil || len(raw) != nonceSize || hex.EncodeToString(raw) != c.Nonce {
		v.refuse("challenge.nonce", challengeHint, "%.80q is not %d bytes in hex", c.Nonce, nonceSize)
	}
	v.time("challenge.expires", c.Expires)
}
