package grant

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// StatementType is the DSSE payload type of a statement.
const StatementType = "application/vnd.sallyport.statement.v1+json"

// ErrSigner says that a statement is signed by somebody else than it names.
var ErrSigner = errors.New("statement of somebody else")

// Step is what a statement says of a grant. Each is final on the nodes that have taken it.
type Step string

// Steps that people take by a statement.
const (
	StepWithdrawn Step = "withdrawn" // by its requester: it is not wanted any more
	StepDenied    Step = "denied"    // by somebody else: it shall not be
	StepReviewed  Step = "reviewed"  // by somebody else, after its end: what was done with it was looked at
)

// Statement is somebody's signed word about one grant. Files carry it, as they carry grants.
type Statement struct {
	ID     string // ULID, new for each statement
	Step   Step
	Grant  string // id of the grant
	Digest string // SHA-256 of the grant's payload in hex: it is about this very one
	By     string // the person who says so
	At     time.Time
	Why    string
}

// wireStatement is a statement's form in JSON; the order of its fields is the canonical order.
type wireStatement struct {
	ID     string `json:"id"`
	Step   Step   `json:"step"`
	Grant  string `json:"grant"`
	Digest string `json:"digest"`
	By     string `json:"by"`
	At     string `json:"at"`
	Why    string `json:"why"`
}

// Digest is the SHA-256 of the payload of a grant's envelope, in hex.
func Digest(envelope []byte) (string, error) {
	_, body, err := openType(envelope, PayloadType, grantHint)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(body)
	return hex.EncodeToString(sum[:]), nil
}

// Validate gives every wrong field at once, as errors.Join of *policy.Error with ErrInvalid.
func (s Statement) Validate() error {
	v := &validation{}
	v.check("id", checkID(s.ID))
	v.check("grant", checkID(s.Grant))
	v.check("by", policy.CheckPersonName(s.By))
	v.check("why", checkText(s.Why, "say why"))
	if !slices.Contains([]Step{StepWithdrawn, StepDenied, StepReviewed}, s.Step) {
		v.refuse("step", "write withdrawn, denied or reviewed", "%.40q is no step", s.Step)
	}
	if raw, err := hex.DecodeString(s.Digest); err != nil || len(raw) != sha256.Size || hex.EncodeToString(raw) != s.Digest {
		v.refuse("digest", "let the command make the statement", "%.80q is not a SHA-256 in hex", s.Digest)
	}
	if s.At.IsZero() || s.At.Year() > 9999 {
		v.refuse("at", "write a time like 2027-01-01T00:00:00Z", "is not a time")
	}
	return errors.Join(v.errs...)
}

func (s Statement) canonical() ([]byte, error) {
	return encode(wireStatement{s.ID, s.Step, s.Grant, s.Digest, s.By, s.At.UTC().Format(time.RFC3339Nano), s.Why})
}

// SignStatement puts a statement into a DSSE envelope, in JSON, signed by k. An invalid one is not signed.
func SignStatement(ctx context.Context, s Statement, k SigningKey) ([]byte, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	body, err := s.canonical()
	if err != nil {
		return nil, fmt.Errorf("encode statement: %w", err)
	}
	return addSignature(ctx, dsse.Envelope{PayloadType: StatementType, Payload: base64.StdEncoding.EncodeToString(body)}, body, k)
}

// VerifyStatement opens a statement. It must be signed by a key of the person whom it names, which is not revoked and has
// not expired at now: ErrSigner if not. Whether that person may say so is for the reader to judge.
func VerifyStatement(envelope []byte, keys []policy.Keyring, now time.Time) (Statement, error) {
	const hint = "take the statement's file as the command wrote it"
	env, body, err := openType(envelope, StatementType, hint)
	if err != nil {
		return Statement{}, err
	}
	signers, err := verifySignatures(env.Signatures, dsse.PAE(StatementType, body), keys, now)
	if err != nil {
		return Statement{}, err
	}
	s, err := parseStatement(body, hint)
	if err != nil {
		return Statement{}, err
	}
	if !slices.ContainsFunc(signers, func(by policy.Signer) bool {
		return by.Person == s.By && (by.May(policy.UseRequest) || by.May(policy.UseApprove))
	}) {
		return Statement{}, refuse("by", ErrSigner, "have "+s.By+" sign it", "names %s, who has not signed it", s.By)
	}
	return s, nil
}

// parseStatement reads a statement that must be in canonical form and valid.
func parseStatement(data []byte, hint string) (Statement, error) {
	var w wireStatement
	if err := decodeStrict("statement", data, &w); err != nil {
		return Statement{}, err
	}
	v := &validation{}
	s := Statement{w.ID, w.Step, w.Grant, w.Digest, w.By, v.parseTime("at", w.At), w.Why}
	if err := errors.Join(v.errs...); err != nil {
		return Statement{}, err
	}
	if err := s.Validate(); err != nil {
		return Statement{}, err
	}
	if canonical, err := s.canonical(); err != nil || !bytes.Equal(canonical, data) {
		return Statement{}, refuse("statement", ErrNotCanonical, hint, "is not written in the one form that is signed")
	}
	return s, nil
}
