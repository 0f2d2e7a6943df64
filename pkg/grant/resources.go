package grant

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// ResourcesType is the DSSE payload type of a signed set of resources.
const ResourcesType = "application/vnd.sallyport.resources.v1+json"

// ErrUnsigned says that a set has not the signatures that it needs.
var ErrUnsigned = errors.New("resources are not signed")

const resourcesHint = "sign them with `sallyport policy sign`"

// wireResources is what is signed of a set; the order of its fields is the canonical order.
type wireResources struct {
	Version uint64 `json:"version"`
	Digest  string `json:"digest"`
}

func resourcesBody(set *policy.Set) ([]byte, error) {
	return encode(wireResources{set.Version(), set.Digest()})
}

// SignResources signs the version and the digest of a set. envelope holds signatures of others for the same set, to which
// this one is added; what it holds of another set is left out. Nil: there are none.
func SignResources(ctx context.Context, set *policy.Set, envelope []byte, k SigningKey) ([]byte, error) {
	body, err := resourcesBody(set)
	if err != nil {
		return nil, fmt.Errorf("encode resources: %w", err)
	}
	env := dsse.Envelope{PayloadType: ResourcesType, Payload: base64.StdEncoding.EncodeToString(body)}
	if others, of, err := openType(envelope, ResourcesType, resourcesHint); err == nil && bytes.Equal(of, body) {
		env = others
	}
	id := k.Public().ID()
	if slices.ContainsFunc(env.Signatures, func(s dsse.Signature) bool { return s.KeyID == id }) {
		return nil, refuse("signatures", ErrMalformed, "have somebody else sign it, if another signature is wanted", "the key %s has signed it already", id)
	}
	if len(env.Signatures) >= maxSignatures {
		return nil, refuse("signatures", ErrMalformed, "begin anew without the file", "has %d signatures, the most is %d", len(env.Signatures), maxSignatures)
	}
	return addSignature(ctx, env, body, k)
}

// VerifyResources gives those who signed the set with a key that may sign resources: as the keyrings have it at now, or one
// that is pinned, of which no keyring says anything. At least as many people as are wanted, or the error wraps ErrUnsigned.
func VerifyResources(envelope []byte, set *policy.Set, keys []policy.Keyring, pinned []policy.PublicKey, wanted int, now time.Time) ([]policy.Signer, error) {
	env, body, err := openType(envelope, ResourcesType, resourcesHint)
	if err != nil {
		return nil, err
	}
	want, err := resourcesBody(set)
	if err != nil {
		return nil, fmt.Errorf("encode resources: %w", err)
	}
	if !bytes.Equal(body, want) {
		return nil, refuse("payload", ErrUnsigned, resourcesHint, "the signatures are for other resources than these: %.200s, not %s", body, want)
	}
	known := policy.KnownKeys(keys)
	for _, k := range pinned {
		known[k.ID()] = policy.PinnedKey(k)
	}
	signers, _, err := verifySignatures(env.Signatures, dsse.PAE(ResourcesType, body), known, now)
	if err != nil {
		return nil, err
	}
	signers = slices.DeleteFunc(signers, func(s policy.Signer) bool { return !s.May(policy.UseResources) })
	people := map[string]bool{}
	for _, s := range signers {
		people[s.Person] = true
	}
	if len(people) < wanted {
		return nil, refuse("signatures", ErrUnsigned, "have it signed by more people whose keys have the use resources",
			"%d of the %d people who have to sign it did", len(people), wanted)
	}
	return signers, nil
}
