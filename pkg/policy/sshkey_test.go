package policy_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/binary"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hiddeco/sshsig"
	"golang.org/x/crypto/ssh"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

var message = []byte("let me through")

// keygen runs OpenSSH's own program.
func keygen(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "ssh-keygen", args...).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen %v: %v: %s", args, err, out)
	}
}

// sshSigned makes a key, and its signature of message in the namespace.
func sshSigned(t *testing.T, kind, namespace string) (key policy.PublicKey, sig []byte) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "key")
	keygen(t, "-q", "-t", kind, "-N", "", "-C", "", "-f", file)
	text, err := os.ReadFile(file + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	if key, err = policy.ParsePublicKey(strings.TrimSpace(string(text))); err != nil {
		t.Fatal(err)
	}
	signed := filepath.Join(t.TempDir(), "message")
	if err := os.WriteFile(signed, message, 0o600); err != nil {
		t.Fatal(err)
	}
	keygen(t, "-q", "-Y", "sign", "-f", file, "-n", namespace, signed)
	armored, err := os.ReadFile(signed + ".sig")
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(armored)
	return key, block.Bytes
}

func TestOpenSSHKeys(t *testing.T) {
	for _, kind := range []string{"ed25519", "ecdsa"} {
		key, sig := sshSigned(t, kind, policy.SSHNamespace)
		if !key.IsSSH() || key.IsZero() {
			t.Errorf("%s: %+v", kind, key)
		}
		if same, err := policy.ParsePublicKey(key.String()); err != nil || same != key {
			t.Errorf("%s: read again as %v, %v", kind, same, err)
		}
		if !key.Verify(message, sig) {
			t.Errorf("%s: its signature does not verify", kind)
		}
		other, _ := sshSigned(t, kind, policy.SSHNamespace)
		for what, wrong := range map[string]bool{
			"another message":            key.Verify([]byte("let me in"), sig),
			"another key":                other.Verify(message, sig),
			"a byte more":                key.Verify(message, append(bytes.Clone(sig), 0)),
			"a byte changed":             key.Verify(message, flipped(sig)),
			"no signature":               key.Verify(message, nil),
			"a signature without a name": key.Verify(message, make([]byte, ed25519.SignatureSize)),
		} {
			if wrong {
				t.Errorf("%s: %s verifies", kind, what)
			}
		}
	}
	if key, sig := sshSigned(t, "ed25519", "git"); key.Verify(message, sig) {
		t.Error("what was signed for something else verifies")
	}
}

func flipped(sig []byte) []byte {
	out := bytes.Clone(sig)
	out[len(out)-1] ^= 1
	return out
}

func TestOpenSSHKeysWrong(t *testing.T) {
	key, _ := sshSigned(t, "ed25519", policy.SSHNamespace)
	kind, encoded, _ := strings.Cut(key.String(), " ")
	zero := append([]byte("\x00\x00\x00\x0bssh-ed25519\x00\x00\x00\x20"), make([]byte, 32)...)
	for _, s := range []string{
		"ssh-rsa " + encoded, "ecdsa-sha2-nistp256 " + encoded, kind + " " + encoded + " alice@example.org", kind + "  " + encoded,
		kind + " " + encoded[:40], kind + " ", " " + encoded, kind + "\t" + encoded, key.String() + "\n",
		"ssh-ed25519-cert-v01@openssh.com " + encoded, wireText("ssh-ed25519", zero),
	} {
		if k, err := policy.ParsePublicKey(s); err == nil || !k.IsZero() {
			t.Errorf("%.90q gave %v, %v", s, k, err)
		}
	}
}

func wireText(kind string, raw []byte) string {
	return kind + " " + base64.StdEncoding.EncodeToString(raw)
}

// securityKey signs as a FIDO authenticator does for OpenSSH (PROTOCOL.u2f): over the hash of the application, flags, a
// counter and the hash of the message.
type securityKey struct {
	ssh.PublicKey
	sign  func(signed []byte) ssh.Signature
	flags byte
}

func (k securityKey) Sign(m []byte) []byte {
	hash := sha512.Sum512(m)
	signedData := append([]byte("SSHSIG"), ssh.Marshal(struct{ Namespace, Reserved, Algorithm, Hash string }{policy.SSHNamespace, "", "sha512", string(hash[:])})...)
	application, inner := sha256.Sum256([]byte("ssh:")), sha256.Sum256(signedData)
	rest := binary.BigEndian.AppendUint32([]byte{k.flags}, 7)
	over := append(append(application[:], rest...), inner[:]...)
	sig := k.sign(over)
	sig.Rest = rest
	return (&sshsig.Signature{Version: 1, PublicKey: k.PublicKey, Namespace: policy.SSHNamespace, HashAlgorithm: sshsig.HashSHA512, Signature: &sig}).Marshal()
}

func ed25519Device(t testing.TB) securityKey {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return device(t, ssh.Marshal(struct {
		Kind        string
		Key         []byte
		Application string
	}{ssh.KeyAlgoSKED25519, public, "ssh:"}), func(signed []byte) ssh.Signature {
		return ssh.Signature{Format: ssh.KeyAlgoSKED25519, Blob: ed25519.Sign(private, signed)}
	})
}

func ecdsaDevice(t testing.TB) securityKey {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	point, err := private.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return device(t, ssh.Marshal(struct {
		Kind, Curve string
		Point       []byte
		Application string
	}{ssh.KeyAlgoSKECDSA256, "nistp256", point, "ssh:"}), func(signed []byte) ssh.Signature {
		s, err := ssh.NewSignerFromKey(private)
		if err != nil {
			t.Fatal(err)
		}
		sig, err := s.Sign(rand.Reader, signed)
		if err != nil {
			t.Fatal(err)
		}
		return ssh.Signature{Format: ssh.KeyAlgoSKECDSA256, Blob: sig.Blob}
	})
}

func device(t testing.TB, wire []byte, sign func([]byte) ssh.Signature) securityKey {
	t.Helper()
	public, err := ssh.ParsePublicKey(wire)
	if err != nil {
		t.Fatal(err)
	}
	return securityKey{PublicKey: public, sign: sign, flags: 1}
}

func TestSecurityKeys(t *testing.T) {
	for _, d := range []securityKey{ed25519Device(t), ecdsaDevice(t)} {
		key, err := policy.ParsePublicKey(wireText(d.Type(), d.Marshal()))
		if err != nil {
			t.Fatal(err)
		}
		if !key.Verify(message, d.Sign(message)) {
			t.Errorf("%s: its signature does not verify", d.Type())
		}
		d.flags = 0
		if key.Verify(message, d.Sign(message)) {
			t.Errorf("%s: a signature that nobody touched for verifies", d.Type())
		}
	}
}

// FuzzOpenSSH: whatever is given as a key has one spelling, and no signature but that of the message verifies under one.
func FuzzOpenSSH(f *testing.F) {
	for _, d := range []securityKey{ed25519Device(f), ecdsaDevice(f)} {
		f.Add(wireText(d.Type(), d.Marshal()), d.Sign(message))
		f.Add(wireText(d.Type(), d.Marshal()), d.Sign([]byte("let me in"))[:50])
	}
	f.Add("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFzHoGJjVDbS3ovA/TvKdUiaRQ2cmrnsXgAudf5t++Q/", []byte("SSHSIG\x00\x00\x00\x01"))
	f.Add("ecdsa-sha2-nistp521 AAAA", []byte{})
	f.Fuzz(func(t *testing.T, text string, sig []byte) {
		key, err := policy.ParsePublicKey(text)
		if err != nil {
			if !key.IsZero() || key.Verify(message, sig) || strings.ContainsAny(err.Error(), "\r\n\x1b") {
				t.Fatalf("%q: key %v, %q", text, key, err)
			}
			return
		}
		if key.String() != text {
			t.Fatalf("%q is spelled %q", text, key)
		}
		if key.Verify([]byte("let me in"), sig) && key.Verify(message, sig) {
			t.Fatalf("%x signs two messages under %s", sig, text)
		}
	})
}
