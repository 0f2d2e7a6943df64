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

// Step is what a statement says.
type Step string

// Steps that people take by a statement. The first three are about a grant, and final on the nodes that have taken them.
const (
	StepWithdrawn Step = "withdrawn" // by its requester: it is not wanted any more
	StepDenied    Step = "denied"    // by somebody who could approve it: it shall not be
	StepReviewed  Step = "reviewed"  // by somebody else, after its end: what was done with it was looked at
	StepActivated Step = "activated" // by its requester, in answer to a node's challenge: it begins, there and now
	StepVouched   Step = "vouched"   // in answer to a node's challenge: its clock is right, and its records are its own
	StepAdvanced  Step = "advanced"  // by an operator of a roll-out: a wave begins
	StepResumed   Step = "resumed"   // by an operator of a roll-out: it goes on after a halt
)

var steps = []Step{StepWithdrawn, StepDenied, StepReviewed, StepActivated, StepVouched, StepAdvanced, StepResumed}

// Statement is somebody's signed word. Files carry it, as they carry grants.
type Statement struct {
	ID     string // ULID, new for each statement
	Step   Step
	Grant  string // id of the grant; empty where it is about none
	Digest string // SHA-256 of the grant's payload, or of a roll-out's plan, in hex: it is about this very one; empty for StepVouched
	By     string // the person who says so
	At     time.Time
	Why    string // may be empty for StepActivated
	// Challenge is the one that StepActivated and StepVouched answer. The others have the zero value.
	Challenge Challenge
	// Rollout is the name of the roll-out that StepAdvanced and StepResumed are about, and Wave the number, from 1 on, of the one that
	// begins by StepAdvanced. The others have the zero values.
	Rollout string
	Wave    uint32
}

// wireStatement is a statement's form in JSON; the order of its fields is the canonical order.
type wireStatement struct {
	ID        string         `json:"id"`
	Step      Step           `json:"step"`
	Grant     string         `json:"grant,omitempty"`
	Digest    string         `json:"digest,omitempty"`
	By        string         `json:"by"`
	At        string         `json:"at"`
	Why       string         `json:"why,omitempty"`
	Challenge *wireChallenge `json:"challenge,omitempty"`
	Rollout   string         `json:"rollout,omitempty"`
	Wave      uint32         `json:"wave,omitempty"`
}

// Digest is the SHA-256 of the payload of a grant's envelope, in hex.
func Digest(envelope []byte) (string, error) {
	_, body, err := openType(envelope, PayloadType, grantHint)
	if err != nil {
		return "", err
	}
	return digestOf(body), nil
}

// Digest is the SHA-256 of the payload in the form that is signed, in hex: that of its envelopes, if it has any.
func (p Payload) Digest() (string, error) {
	body, err := p.canonical()
	if err != nil {
		return "", fmt.Errorf("encode grant: %w", err)
	}
	return digestOf(body), nil
}

func digestOf(body []byte) string {
	sum := sha256.Sum256(body)
	return hex.EncodeToString(sum[:])
}

// Validate gives every wrong field at once, as errors.Join of *policy.Error with ErrInvalid.
func (s Statement) Validate() error {
	v := &validation{}
	v.check("id", checkID(s.ID))
	if !slices.Contains(steps, s.Step) {
		v.refuse("step", "let the command make the statement", "%.40q is no step", s.Step)
	}
	v.about(s)
	v.check("by", policy.CheckPersonName(s.By))
	if s.Why != "" || s.Step != StepActivated {
		v.check("why", checkText(s.Why, "say why"))
	}
	v.time("at", s.At)
	if s.answers() {
		s.Challenge.validate(v)
	} else if s.Challenge != (Challenge{}) {
		v.refuse("challenge", "let the command make the statement", "a statement of this step answers none")
	}
	return errors.Join(v.errs...)
}

// answers tells whether a statement of this step answers a challenge.
func (s Statement) answers() bool { return s.Step == StepActivated || s.Step == StepVouched }

// ofRollout tells whether a statement of this step is about a roll-out.
func (s Statement) ofRollout() bool { return s.Step == StepAdvanced || s.Step == StepResumed }

func (v *validation) about(s Statement) {
	const hint = "let the command make the statement"
	if (s.Step == StepAdvanced) != (s.Wave != 0) {
		v.refuse("wave", hint, "a wave goes with the step advanced, and with nothing else")
	}
	switch {
	case s.ofRollout():
		v.check("rollout", policy.CheckName(s.Rollout))
	case s.Rollout != "":
		v.refuse("rollout", hint, "a statement of this step is about no roll-out")
	}
	switch {
	case s.Step != StepVouched && !s.ofRollout():
		v.check("grant", checkID(s.Grant))
	case s.Grant != "":
		v.refuse("grant", hint, "a statement of this step is about no grant")
	}
	switch raw, err := hex.DecodeString(s.Digest); {
	case s.Step == StepVouched:
		if s.Digest != "" {
			v.refuse("digest", hint, "a statement of this step is about no grant")
		}
	case err != nil || len(raw) != sha256.Size || hex.EncodeToString(raw) != s.Digest:
		v.refuse("digest", hint, "%.80q is not a SHA-256 in hex", s.Digest)
	}
}

func (s Statement) canonical() ([]byte, error) {
	w := wireStatement{s.ID, s.Step, s.Grant, s.Digest, s.By, s.At.UTC().Format(time.RFC3339Nano), s.Why, nil, s.Rollout, s.Wave}
	if s.answers() {
		w.Challenge = s.Challenge.wire()
	}
	return encode(w)
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

// VerifyStatement opens a statement, and gives whose signatures it has of the person whom it names: at least one, of a key
// that is not revoked and has not expired at now; ErrSigner if there is none. Whether that person may say so, with that
// key, is for the reader to judge.
func VerifyStatement(envelope []byte, keys []policy.Keyring, now time.Time) (Statement, []policy.Signer, error) {
	env, body, err := openType(envelope, StatementType, statementHint)
	if err != nil {
		return Statement{}, nil, err
	}
	signers, _, err := verifySignatures(env.Signatures, dsse.PAE(StatementType, body), policy.KnownKeys(keys), now)
	if err != nil {
		return Statement{}, nil, err
	}
	s, err := parseStatement(body)
	if err != nil {
		return Statement{}, nil, err
	}
	signers = slices.DeleteFunc(signers, func(by policy.Signer) bool { return by.Person != s.By })
	if len(signers) == 0 {
		return Statement{}, nil, refuse("by", ErrSigner, "have "+s.By+" sign it", "names %s, who has not signed it", s.By)
	}
	return s, signers, nil
}

// PeekStatement reads a statement without looking at its signatures. It is for showing what a file says; nothing may be
// decided by it.
func PeekStatement(envelope []byte) (Statement, error) {
	_, body, err := openType(envelope, StatementType, statementHint)
	if err != nil {
		return Statement{}, err
	}
	return parseStatement(body)
}

const statementHint = "take the statement's file as the command wrote it"

// Answer makes the requester's answer to a node's challenge: the grant in the envelope begins there. challenge is as the
// node wrote it, k one of the requester's keys, and now the requester's wall clock.
func Answer(ctx context.Context, envelope, challenge []byte, k SigningKey, now time.Time) ([]byte, error) {
	p, err := Peek(envelope)
	if err != nil {
		return nil, err
	}
	c, err := ParseChallenge(challenge)
	if err != nil {
		return nil, err
	}
	if err := p.CheckAudience(c.Node); err != nil {
		return nil, err
	}
	digest, err := Digest(envelope)
	if err != nil {
		return nil, err
	}
	id, err := NewID(now)
	if err != nil {
		return nil, err
	}
	return SignStatement(ctx, Statement{ID: id, Step: StepActivated, Grant: p.ID, Digest: digest, By: p.Requester, At: now, Challenge: c}, k)
}

// parseStatement reads a statement that must be in canonical form and valid.
func parseStatement(data []byte) (Statement, error) {
	var w wireStatement
	if err := decodeStrict("statement", data, &w); err != nil {
		return Statement{}, err
	}
	v := &validation{}
	s := Statement{w.ID, w.Step, w.Grant, w.Digest, w.By, v.parseTime("at", w.At), w.Why, w.Challenge.read(v), w.Rollout, w.Wave}
	if err := errors.Join(v.errs...); err != nil {
		return Statement{}, err
	}
	if err := s.Validate(); err != nil {
		return Statement{}, err
	}
	if canonical, err := s.canonical(); err != nil || !bytes.Equal(canonical, data) {
		return Statement{}, refuse("statement", ErrNotCanonical, statementHint, "is not written in the one form that is signed")
	}
	return s, nil
}
