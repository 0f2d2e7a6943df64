package grant

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// DrillType is the DSSE payload type of the record of a drill.
const DrillType = "application/vnd.sallyport.drill.v1+json"

// Drill is somebody's signed word on what they saw when a path ended while the agent was stopped. Its JSON, with times in UTC, is what is
// signed; the order of its fields is the canonical order.
type Drill struct {
	ID      string         `json:"id"` // ULID, new for each drill
	By      string         `json:"by"` // the person who says so
	Node    string         `json:"node"`
	Service string         `json:"service"`
	Client  netip.Addr     `json:"client"`
	Server  netip.AddrPort `json:"server"`
	Grant   string         `json:"grant"`  // id of the grant whose path was tried
	Digest  string         `json:"digest"` // SHA-256 of its payload, in hex
	// Activated and Deadline are the path's; Stopped is when the agent was seen not to answer, Tried when the path was tried, and Back
	// when the agent answered again.
	Activated time.Time `json:"activated"`
	Deadline  time.Time `json:"deadline"`
	Stopped   time.Time `json:"stopped"`
	Tried     time.Time `json:"tried"`
	Back      time.Time `json:"back"`
	// Before is what a connection met before the path was open, Live what became of the one that used it, and New what a connection
	// met after the deadline: words.
	Before string `json:"before"`
	Live   string `json:"live"`
	New    string `json:"new"`
	// Closed says that the path carried a connection, and that after the deadline neither that one nor a new one did.
	Closed bool `json:"closed"`
}

const drillHint = "take the drill's record as `sallyport drill run` wrote it"

// Validate gives every wrong field at once, as errors.Join of *policy.Error with ErrInvalid.
func (d Drill) Validate() error {
	v := &validation{}
	v.check("id", checkID(d.ID))
	v.check("by", policy.CheckPersonName(d.By))
	v.check("node", policy.CheckNodeName(d.Node))
	v.check("service", policy.CheckName(d.Service))
	v.check("grant", checkID(d.Grant))
	if raw, err := hex.DecodeString(d.Digest); err != nil || hex.EncodeToString(raw) != d.Digest || len(raw) != 32 {
		v.refuse("digest", drillHint, "%.80q is not a SHA-256 in hex", d.Digest)
	}
	if !d.Client.IsValid() || !d.Server.IsValid() {
		v.refuse("client", drillHint, "client or server is no address")
	}
	for field, t := range map[string]time.Time{"activated": d.Activated, "deadline": d.Deadline, "stopped": d.Stopped, "tried": d.Tried, "back": d.Back} {
		v.time(field, t)
	}
	for field, text := range map[string]string{"before": d.Before, "live": d.Live, "new": d.New} {
		v.check(field, checkText(text, "say what was seen"))
	}
	if d.Closed && !d.proves() {
		v.refuse("closed", drillHint, "the agent was not stopped before the deadline, or the path was tried before it")
	}
	return errors.Join(v.errs...)
}

// proves says that the times are in the order without which nothing is shown.
func (d Drill) proves() bool {
	return d.Activated.Before(d.Stopped) && d.Stopped.Before(d.Deadline) && d.Deadline.Before(d.Tried) && d.Tried.Before(d.Back)
}

func (d Drill) canonical() ([]byte, error) {
	for _, t := range []*time.Time{&d.Activated, &d.Deadline, &d.Stopped, &d.Tried, &d.Back} {
		*t = t.UTC()
	}
	return encode(d)
}

// SignDrill puts the record of a drill into a DSSE envelope, in JSON, signed by k. An invalid one is not signed.
func SignDrill(ctx context.Context, d Drill, k SigningKey) ([]byte, error) {
	if err := d.Validate(); err != nil {
		return nil, err
	}
	body, err := d.canonical()
	if err != nil {
		return nil, fmt.Errorf("encode drill: %w", err)
	}
	return addSignature(ctx, dsse.Envelope{PayloadType: DrillType, Payload: base64.StdEncoding.EncodeToString(body)}, body, k)
}

// VerifyDrill opens the record of a drill, and gives whose signatures it has of the person whom it names: at least one, of a key that is
// not revoked and has not expired at now; ErrSigner if there is none.
func VerifyDrill(envelope []byte, keys []policy.Keyring, now time.Time) (Drill, []policy.Signer, error) {
	env, body, err := openType(envelope, DrillType, drillHint)
	if err != nil {
		return Drill{}, nil, err
	}
	signers, _, err := verifySignatures(env.Signatures, dsse.PAE(DrillType, body), policy.KnownKeys(keys), now)
	if err != nil {
		return Drill{}, nil, err
	}
	d, err := parseDrill(body)
	if err != nil {
		return Drill{}, nil, err
	}
	signers = slices.DeleteFunc(signers, func(by policy.Signer) bool { return by.Person != d.By })
	if len(signers) == 0 {
		return Drill{}, nil, refuse("by", ErrSigner, "have "+d.By+" sign it", "names %s, who has not signed it", d.By)
	}
	return d, signers, nil
}

// parseDrill reads a record that must be in canonical form and valid.
func parseDrill(data []byte) (Drill, error) {
	var d Drill
	if err := decodeStrict("drill", data, &d); err != nil {
		return Drill{}, err
	}
	if err := d.Validate(); err != nil {
		return Drill{}, err
	}
	if canonical, err := d.canonical(); err != nil || !bytes.Equal(canonical, data) {
		return Drill{}, refuse("drill", ErrNotCanonical, drillHint, "is not written in the one form that is signed")
	}
	return d, nil
}
