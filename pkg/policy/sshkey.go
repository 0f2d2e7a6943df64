package policy

import (
	"bytes"
	"slices"
	"strings"

	"github.com/hiddeco/sshsig"
	"golang.org/x/crypto/ssh"
)

// SSHNamespace keeps what OpenSSH keys sign for Sallyport apart from whatever else they sign: ssh-keygen -Y sign -n.
const SSHNamespace = "grant@sallyport.dev"

// sshKinds are the types of OpenSSH keys that may sign. RSA and DSA are not among them, nor are certificates.
var sshKinds = []string{ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521, ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256}

func parseSSHKey(kind, encoded string) (PublicKey, error) {
	if !slices.Contains(sshKinds, kind) {
		return PublicKey{}, faultf("use one of "+strings.Join(sshKinds, ", "), "keys of the type %q do not sign grants", kind)
	}
	raw, err := decodeKey(encoded)
	if err != nil {
		return PublicKey{}, faultf(publicKeyHint, "%q is not base64 after %s", encoded, kind)
	}
	key, err := ssh.ParsePublicKey(raw)
	if err != nil || key.Type() != kind || !bytes.Equal(key.Marshal(), raw) {
		return PublicKey{}, faultf(publicKeyHint, "what follows %s is no key of that type", kind)
	}
	if err := checkSSHEd25519(raw); err != nil {
		return PublicKey{}, err
	}
	return PublicKey{kind, string(raw)}, nil
}

// checkSSHEd25519 looks into the wire format of RFC 8709, which that of security keys begins with.
func checkSSHEd25519(raw []byte) error {
	var wire struct {
		Type string
		Key  []byte
		Rest []byte `ssh:"rest"`
	}
	if err := ssh.Unmarshal(raw, &wire); err != nil {
		return faultf(publicKeyHint, "the key cannot be read: %v", err)
	}
	if wire.Type != ssh.KeyAlgoED25519 && wire.Type != ssh.KeyAlgoSKED25519 {
		return nil
	}
	return checkEd25519(wire.Key)
}

// verifySSH takes a signature as OpenSSH makes it (PROTOCOL.sshsig), without its armor. One of a security key counts only
// where somebody touched it.
func (k PublicKey) verifySSH(message, blob []byte) bool {
	key, err := ssh.ParsePublicKey([]byte(k.raw))
	if err != nil {
		return false
	}
	sig, err := sshsig.ParseSignature(blob)
	if err != nil || !bytes.Equal(sig.Marshal(), blob) {
		return false
	}
	return sshsig.Verify(bytes.NewReader(message), sig, key, sig.HashAlgorithm, SSHNamespace) == nil
}
