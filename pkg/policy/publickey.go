package policy

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"strings"
)

const publicKeyPrefix = "ed25519:"

const publicKeyHint = "write ed25519: and the key in base64, as `sallyport keygen` prints it"

// PublicKey is an Ed25519 public key. Its text form is "ed25519:" and the key in base64. It can be
// compared with ==. The zero value is no key.
type PublicKey struct {
	raw   [ed25519.PublicKeySize]byte
	valid bool
}

// NewPublicKey takes over an Ed25519 key. It refuses another length, and the few keys of small
// order, under which anybody can make a signature.
func NewPublicKey(key ed25519.PublicKey) (PublicKey, error) {
	if len(key) != ed25519.PublicKeySize {
		return PublicKey{}, faultf(publicKeyHint, "the key has %d bytes instead of %d", len(key), ed25519.PublicKeySize)
	}
	k := PublicKey{raw: [ed25519.PublicKeySize]byte(key), valid: true}
	if k.isSmallOrder() {
		return PublicKey{}, faultf("make a key with `sallyport keygen`", "the key is one under which anybody can sign")
	}
	return k, nil
}

// ParsePublicKey reads the text form.
func ParsePublicKey(s string) (PublicKey, error) {
	encoded, ok := strings.CutPrefix(s, publicKeyPrefix)
	if !ok {
		return PublicKey{}, faultf(publicKeyHint, "%q does not begin with %s", s, publicKeyPrefix)
	}
	raw, err := base64.StdEncoding.Strict().DecodeString(encoded)
	if err != nil || strings.ContainsAny(encoded, "\r\n") {
		return PublicKey{}, faultf(publicKeyHint, "%q is not base64 after %s", s, publicKeyPrefix)
	}
	return NewPublicKey(raw)
}

// ID is the key's short name: "sp:" and the first 16 hex digits of the SHA-256 of the key.
func (k PublicKey) ID() string {
	sum := sha256.Sum256(k.raw[:])
	return "sp:" + hex.EncodeToString(sum[:8])
}

// IsZero reports whether there is no key.
func (k PublicKey) IsZero() bool { return !k.valid }

// Verify reports whether sig is the key's signature of message. The zero key verifies nothing.
func (k PublicKey) Verify(message, sig []byte) bool {
	return k.valid && ed25519.Verify(k.raw[:], message, sig)
}

// String gives the text form.
func (k PublicKey) String() string {
	if !k.valid {
		return ""
	}
	return publicKeyPrefix + base64.StdEncoding.EncodeToString(k.raw[:])
}

// MarshalText gives the text form.
func (k PublicKey) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText reads the text form.
func (k *PublicKey) UnmarshalText(text []byte) error {
	parsed, err := ParsePublicKey(string(text))
	if err != nil {
		return err
	}
	*k = parsed
	return nil
}

// smallOrder lists the y coordinates of the points of small order, in every encoding that decodes,
// the bit of the sign left out.
var smallOrder = [...]string{
	"0000000000000000000000000000000000000000000000000000000000000000",
	"0100000000000000000000000000000000000000000000000000000000000000",
	"26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
	"c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
	"ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
}

func (k PublicKey) isSmallOrder() bool {
	y := k.raw
	y[len(y)-1] &= 0x7f
	encoded := hex.EncodeToString(y[:])
	for _, s := range smallOrder {
		if s == encoded {
			return true
		}
	}
	return false
}
