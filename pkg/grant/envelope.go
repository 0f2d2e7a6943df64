package grant

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// Bounds of an envelope.
const (
	// MaxEnvelope is the largest envelope that is looked at, in bytes.
	MaxEnvelope   = 64 << 10
	maxSignatures = 16
)

// Verified is a payload with those who signed it, at least one.
type Verified struct {
	Payload Payload
	Signers []policy.Signer
	// Besides are people who signed it with a key that counts no more: they approve nothing, but had a part in it.
	Besides []string
}

// People are all who had a part in it, each once.
func (v Verified) People() (people []string) {
	for _, s := range v.Signers {
		people = append(people, s.Person)
	}
	people = append(people, v.Besides...)
	slices.Sort(people)
	return slices.Compact(people)
}

// Facts are what policy looks at. nodeAddresses are the node's own, now is the time of activation, or zero where nobody
// knows it yet.
func (v Verified) Facts(nodeAddresses []netip.Addr, now time.Time) policy.GrantFacts {
	p := v.Payload
	return policy.GrantFacts{
		ID: p.ID, Service: p.Service, Ports: p.Ports, Addresses: p.Addresses, Duration: p.Duration, Budget: p.Budget, Ingress: p.Ingress,
		Binding: p.Binding, BreakGlass: p.Kind == BreakGlass, Ticket: p.Ticket, Reason: p.Reason, Template: p.Template,
		Requester: p.Requester, Signers: v.Signers, NodeAddresses: nodeAddresses, Now: now,
	}
}

// SigningKey makes signatures: a PrivateKey, or a key that somebody else holds.
type SigningKey interface {
	// Public is the half that stands in a Keyring.
	Public() policy.PublicKey
	// Sign makes a signature that Public verifies.
	Sign(ctx context.Context, message []byte) ([]byte, error)
}

// Proven is a payload that a workload asked for by itself: it signed nothing, but proved its identity to the agent, which
// made the payload. proof names the proof, as a key id names that of a signature.
func Proven(p Payload, proof string) Verified {
	return Verified{Payload: p, Signers: []policy.Signer{{Person: p.Requester, KeyID: proof, Uses: []policy.Use{policy.UseRequest}}}}
}

// validateSigned is Validate for what is signed: a signature says nothing of the sockets that somebody has.
func (p Payload) validateSigned() error {
	err := p.Validate()
	if p.Binding != policy.BindingAddress && policy.CheckBinding(p.Binding) == nil {
		err = errors.Join(err, refuse("binding", ErrInvalid, "have the workload ask for it itself: `sallyport exec`",
			"a path that is bound to a %s is not signed for", p.Binding))
	}
	if p.Device != 0 {
		err = errors.Join(err, refuse("device", ErrInvalid, "leave it out", "only a workload asks from a device"))
	}
	return err
}

// Sign puts a payload into a DSSE envelope, in JSON, signed by k. An invalid payload is not signed:
// the error is that of Validate.
func Sign(ctx context.Context, p Payload, k SigningKey) ([]byte, error) {
	if err := p.validateSigned(); err != nil {
		return nil, err
	}
	body, err := p.canonical()
	if err != nil {
		return nil, fmt.Errorf("encode grant: %w", err)
	}
	return addSignature(ctx, dsse.Envelope{PayloadType: PayloadType, Payload: base64.StdEncoding.EncodeToString(body)}, body, k)
}

// Approve adds the signature of k to an envelope, over the very payload that it has. Who may approve is for policy to
// say. ErrMalformed: the key has signed it already, or there is no room for one more.
func Approve(ctx context.Context, envelope []byte, k SigningKey) ([]byte, error) {
	env, body, err := open(envelope)
	if err != nil {
		return nil, err
	}
	if _, err := parsePayload(body); err != nil {
		return nil, err
	}
	id := k.Public().ID()
	if slices.ContainsFunc(env.Signatures, func(s dsse.Signature) bool { return s.KeyID == id }) {
		return nil, refuse("signatures", ErrMalformed, "have somebody else approve it", "the key %s has signed it already", id)
	}
	if len(env.Signatures) >= maxSignatures {
		return nil, refuse("signatures", ErrMalformed, "ask for it again", "has %d signatures, the most is %d", len(env.Signatures), maxSignatures)
	}
	return addSignature(ctx, env, body, k)
}

func addSignature(ctx context.Context, env dsse.Envelope, body []byte, k SigningKey) ([]byte, error) {
	sig, err := k.Sign(ctx, dsse.PAE(env.PayloadType, body))
	if err != nil {
		return nil, err
	}
	env.Signatures = append(env.Signatures, dsse.Signature{KeyID: k.Public().ID(), Sig: base64.StdEncoding.EncodeToString(sig)})
	return encode(env)
}

// Verify opens an envelope. At least one signature must be that of a key in the keyrings which is not revoked and has
// not expired at now; a signature of an unknown, revoked or expired key beside it counts for nothing, and one
// that does not verify under a known key spoils the envelope. The payload must be valid and in
// canonical form. Whether the grant is due, for this node, and allowed is for CheckTime,
// CheckAudience, CheckPolicy and policy.Set.CheckGrant to say.
func Verify(envelope []byte, keys []policy.Keyring, now time.Time) (Verified, error) {
	env, body, err := open(envelope)
	if err != nil {
		return Verified{}, err
	}
	signers, besides, err := verifySignatures(env.Signatures, dsse.PAE(PayloadType, body), policy.KnownKeys(keys), now)
	if err != nil {
		return Verified{}, err
	}
	p, err := parsePayload(body)
	if err != nil {
		return Verified{}, err
	}
	return Verified{Payload: p, Signers: signers, Besides: besides}, nil
}

// Peek reads the payload of an envelope without looking at its signatures. It is for showing what a
// file says; nothing may be decided by it.
func Peek(envelope []byte) (Payload, error) {
	_, body, err := open(envelope)
	if err != nil {
		return Payload{}, err
	}
	return parsePayload(body)
}

// SignedBy gives everybody whose signature is on an envelope, by the keys that the keyrings have, whether these count or not.
// It is for telling who had a part in it; nothing is allowed by it.
func SignedBy(envelope []byte, keys []policy.Keyring) (people []string) {
	env, body, err := open(envelope)
	if err != nil {
		return nil
	}
	known, message := policy.KnownKeys(keys), dsse.PAE(PayloadType, body)
	for _, s := range env.Signatures {
		key, ok := known[s.KeyID]
		if sig, err := decode64(s.Sig); ok && err == nil && key.PublicKey.Verify(message, sig) {
			people = append(people, key.Person)
		}
	}
	return people
}

// open takes an envelope apart. Its JSON must be what we would write, but for spaces: a key given
// twice or in other letters would be read differently by other readers.
func open(envelope []byte) (dsse.Envelope, []byte, error) {
	return openType(envelope, PayloadType, grantHint)
}

const grantHint = "take the grant's file as `sallyport grant issue` wrote it"

// openType is open for any of our types.
func openType(envelope []byte, payloadType, hint string) (dsse.Envelope, []byte, error) {
	var env dsse.Envelope
	if len(envelope) > MaxEnvelope {
		return env, nil, refuse("envelope", ErrMalformed, hint, "has %d bytes, the most is %d", len(envelope), MaxEnvelope)
	}
	if err := decodeStrict("envelope", envelope, &env); err != nil {
		return env, nil, err
	}
	if env.PayloadType != payloadType {
		return env, nil, refuse("payloadType", ErrMalformed, hint, "want %s, got %q", payloadType, env.PayloadType)
	}
	var compact bytes.Buffer
	written, err := encode(env)
	if err != nil || json.Compact(&compact, envelope) != nil || !bytes.Equal(compact.Bytes(), written) {
		return env, nil, refuse("envelope", ErrNotCanonical, hint, "has a key twice, in other letters or with needless escapes")
	}
	body, err := decode64(env.Payload)
	if err != nil {
		return env, nil, refuse("payload", ErrMalformed, hint, "is not base64")
	}
	return env, body, nil
}

// decode64 takes the one spelling of every value that we write, so that no byte of an envelope can be changed.
func decode64(s string) ([]byte, error) {
	raw, err := base64.StdEncoding.Strict().DecodeString(s)
	if err == nil && base64.StdEncoding.EncodeToString(raw) != s {
		err = base64.CorruptInputError(0) // it reads past ends of lines
	}
	return raw, err
}

// verifySignatures gives the signers, and beside them people whose keys count no more; or what is wrong with each signature if
// there are no signers.
func verifySignatures(sigs []dsse.Signature, message []byte, known map[string]policy.KnownKey, now time.Time) (signers []policy.Signer, besides []string, err error) {
	if len(sigs) == 0 || len(sigs) > maxSignatures {
		return nil, nil, refuse("signatures", ErrMalformed, "sign it once with `sallyport grant issue`",
			"has %d signatures, want 1 to %d", len(sigs), maxSignatures)
	}
	seen := map[string]bool{}
	var uncounted []error
	for i, s := range sigs {
		field := fmt.Sprintf("signatures[%d]", i)
		if seen[s.KeyID] {
			return nil, nil, refuse(field+".keyid", ErrMalformed, "remove one of them", "the key %q has signed twice", s.KeyID)
		}
		seen[s.KeyID] = true
		signer, err := verifyOne(field, s, message, known, now)
		switch {
		case errors.Is(err, ErrUnknownKey):
			uncounted = append(uncounted, err)
		case errors.Is(err, ErrKeyExpired) || errors.Is(err, ErrKeyRevoked):
			uncounted, besides = append(uncounted, err), append(besides, signer.Person)
		case err != nil:
			return nil, nil, err
		default:
			signers = append(signers, signer)
		}
	}
	if len(signers) == 0 {
		return nil, nil, errors.Join(uncounted...)
	}
	return signers, besides, nil
}

// verifyOne gives whose signature it is; with ErrKeyExpired and ErrKeyRevoked, too.
func verifyOne(field string, s dsse.Signature, message []byte, known map[string]policy.KnownKey, now time.Time) (policy.Signer, error) {
	key, ok := known[s.KeyID]
	if !ok {
		return policy.Signer{}, unknownKey(field, s.KeyID)
	}
	sig, err := decode64(s.Sig)
	if err != nil || !key.PublicKey.Verify(message, sig) {
		return policy.Signer{}, refuse(field+".sig", ErrSignature, "issue the grant again: it was changed after it was signed",
			"does not verify under the key %s of %s", s.KeyID, key.Person)
	}
	return countOne(field, s.KeyID, key, now)
}

// countOne gives whose signature it is that verifies; with ErrKeyExpired and ErrKeyRevoked, too.
func countOne(field, id string, key policy.KnownKey, now time.Time) (policy.Signer, error) {
	by := policy.Signer{Person: key.Person, KeyID: id, Uses: key.Uses}
	switch {
	case key.Revoked:
		return by, refuse(field+".keyid", ErrKeyRevoked, "sign with another key", "the key %s of %s is revoked", id, key.Person)
	case key.Ended(now):
		return by, refuse(field+".keyid", ErrKeyExpired, "sign with a key that is still valid",
			"the key %s of %s ended at %s", id, key.Person, stamp(key.Until))
	}
	return by, nil
}

// Recount is Verify for a payload whose signatures were verified before, now that the keyrings are others: signed are the ids of the
// keys that signed it, known those of the keyrings by their ids. What a key has signed stays signed; whose it is, and whether
// it counts at now, is asked anew. The errors are those of Verify for keys that do not count.
func Recount(p Payload, signed []string, known map[string]policy.KnownKey, now time.Time) (Verified, error) {
	v := Verified{Payload: p}
	var uncounted []error
	for i, id := range signed {
		field := fmt.Sprintf("signatures[%d]", i)
		key, ok := known[id]
		if !ok {
			uncounted = append(uncounted, unknownKey(field, id))
			continue
		}
		signer, err := countOne(field, id, key, now)
		if err != nil {
			uncounted, v.Besides = append(uncounted, err), append(v.Besides, signer.Person)
			continue
		}
		v.Signers = append(v.Signers, signer)
	}
	switch {
	case len(signed) == 0:
		return Verified{}, refuse("signatures", ErrMalformed, grantHint, "has no signature")
	case len(v.Signers) == 0:
		return Verified{}, errors.Join(uncounted...)
	}
	return v, nil
}

func unknownKey(field, id string) error {
	return refuse(field+".keyid", ErrUnknownKey, "add the public key to a Keyring, or sign with a key that is in one", "no Keyring has the key %.80q", id)
}
