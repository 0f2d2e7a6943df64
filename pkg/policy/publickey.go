package policy

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"slices"
	"strings"
)

const (
	publicKeyPrefix = "ed25519:"
	publicKeyHint   = "write ed25519: and the key in base64, as `sallyport keygen` prints it, or a key of OpenSSH as its .pub file has it, without the comment"
)

// PublicKey is the public half of a key that signs: a plain Ed25519 key, or one of OpenSSH, which may live in a
// security key. Its text form is "ed25519:" and the key in base64, or the first two words of OpenSSH's own form. It can
// be compared with ==. The zero value is no key.
// +kubebuilder:validation:MinLength=1
// +kubebuilder:validation:MaxLength=2048
// +kubebuilder:validation:Pattern=`^(ed25519:[A-Za-z0-9+/]{43}=|(ssh-ed25519|ecdsa-sha2-nistp(256|384|521)|sk-ssh-ed25519@openssh\.com|sk-ecdsa-sha2-nistp256@openssh\.com) [A-Za-z0-9+/]+={0,2})$`
type PublicKey struct {
	kind string // plain, or the SSH key type
	raw  string // 32 bytes, or the SSH wire format
}

const plain = "ed25519"

// NewPublicKey takes over an Ed25519 key. It refuses another length, and the few keys of small
// order, under which anybody can make a signature.
func NewPublicKey(key ed25519.PublicKey) (PublicKey, error) {
	if err := checkEd25519(key); err != nil {
		return PublicKey{}, err
	}
	return PublicKey{plain, string(key)}, nil
}

func checkEd25519(key ed25519.PublicKey) error {
	if len(key) != ed25519.PublicKeySize {
		return faultf(publicKeyHint, "the key has %d bytes instead of %d", len(key), ed25519.PublicKeySize)
	}
	if isSmallOrder(key) {
		return faultf("make a key with `sallyport keygen`", "the key is one under which anybody can sign")
	}
	return nil
}

// ParsePublicKey reads the text form.
func ParsePublicKey(s string) (PublicKey, error) {
	if kind, encoded, ok := strings.Cut(s, " "); ok {
		return parseSSHKey(kind, encoded)
	}
	encoded, ok := strings.CutPrefix(s, publicKeyPrefix)
	if !ok {
		return PublicKey{}, faultf(publicKeyHint, "%q does not begin with %s or the type of an OpenSSH key", s, publicKeyPrefix)
	}
	raw, err := decodeKey(encoded)
	if err != nil {
		return PublicKey{}, faultf(publicKeyHint, "%q is not base64 after %s", s, publicKeyPrefix)
	}
	return NewPublicKey(raw)
}

// decodeKey takes the one spelling of every key: base64 itself reads past ends of lines.
func decodeKey(encoded string) ([]byte, error) {
	raw, err := base64.StdEncoding.Strict().DecodeString(encoded)
	if err == nil && base64.StdEncoding.EncodeToString(raw) != encoded {
		err = base64.CorruptInputError(0)
	}
	return raw, err
}

// ID is the key's short name: "sp:" and the first 16 hex digits of the SHA-256 of the key.
func (k PublicKey) ID() string {
	sum := sha256.Sum256([]byte(k.raw))
	return "sp:" + hex.EncodeToString(sum[:8])
}

// IsZero reports whether there is no key.
func (k PublicKey) IsZero() bool { return k.kind == "" }

// IsSSH reports whether the key is one of OpenSSH.
func (k PublicKey) IsSSH() bool { return !k.IsZero() && k.kind != plain }

// Verify reports whether sig is the key's signature of message: 64 bytes of a plain Ed25519 key, a binary SSHSIG in
// SSHNamespace of an OpenSSH key. The zero key verifies nothing.
func (k PublicKey) Verify(message, sig []byte) bool {
	switch {
	case k.IsZero():
		return false
	case k.IsSSH():
		return k.verifySSH(message, sig)
	}
	return ed25519.Verify(ed25519.PublicKey(k.raw), message, sig)
}

// String gives the text form.
func (k PublicKey) String() string {
	encoded := base64.StdEncoding.EncodeToString([]byte(k.raw))
	switch {
	case k.IsZero():
		return ""
	case k.IsSSH():
		return k.kind + " " + encoded
	}
	return publicKeyPrefix + encoded
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

func isSmallOrder(key ed25519.PublicKey) bool {
	y := bytes.Clone(key)
	y[len(y)-1] &= 0x7f
	return slices.Contains(smallOrder[:], hex.EncodeToString(y))
}
