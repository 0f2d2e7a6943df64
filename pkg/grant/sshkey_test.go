package grant_test

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// sshKey has OpenSSH make a key, and names its private half.
func sshKey(t *testing.T, kind, passphrase string) (file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "id")
	if out, err := exec.CommandContext(t.Context(), "ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", "somebody here", "-f", file).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
	return file
}

func signingKey(t *testing.T, file string) grant.SigningKey {
	t.Helper()
	k, err := grant.ReadSigningKey(file, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func ring(keys map[string]grant.SigningKey) []policy.Keyring {
	var r policy.Keyring
	for name, k := range keys {
		r.Spec.People = append(r.Spec.People, policy.Person{Name: name, Keys: []policy.Key{{PublicKey: k.Public()}}})
	}
	return []policy.Keyring{r}
}

// TestSeveralSign: a grant with signatures of our own and of OpenSSH's keys, each by another person.
func TestSeveralSign(t *testing.T) {
	alice := newKey(t)
	bob, carol := signingKey(t, sshKey(t, "ed25519", "")), signingKey(t, sshKey(t, "ecdsa", ""))
	keys := ring(map[string]grant.SigningKey{"alice": alice, "bob": bob, "carol": carol})
	envelope, err := grant.Sign(t.Context(), goodPayload(), alice)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range []grant.SigningKey{bob, carol} {
		if envelope, err = grant.Approve(t.Context(), envelope, k); err != nil {
			t.Fatal(err)
		}
	}
	v, err := grant.Verify(envelope, keys, time.Now())
	if err != nil || len(v.Signers) != 3 {
		t.Fatalf("signed by %v, %v", v.Signers, err)
	}
	for i, name := range []string{"alice", "bob", "carol"} {
		if v.Signers[i].Person != name {
			t.Errorf("signature %d is of %s, want %s", i, v.Signers[i].Person, name)
		}
	}
	if _, err := grant.Approve(t.Context(), envelope, bob); !errors.Is(err, grant.ErrMalformed) {
		t.Errorf("bob signed twice: %v", err)
	}
	if _, err := grant.Approve(t.Context(), []byte(`{}`), bob); err == nil {
		t.Error("bob approved nothing at all")
	}
}

func TestApproveHasABound(t *testing.T) {
	envelope, err := grant.Sign(t.Context(), goodPayload(), newKey(t))
	for i := 1; i < 16 && err == nil; i++ {
		envelope, err = grant.Approve(t.Context(), envelope, newKey(t))
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := grant.Approve(t.Context(), envelope, newKey(t)); !errors.Is(err, grant.ErrMalformed) {
		t.Errorf("a 17th signature: %v", err)
	}
}

func TestReadSigningKey(t *testing.T) {
	file := sshKey(t, "ed25519", "")
	if a, b := signingKey(t, file), signingKey(t, file+".pub"); a.Public() != b.Public() || !a.Public().IsSSH() {
		t.Errorf("halves of one key: %v and %v", a.Public(), b.Public())
	}
	own := filepath.Join(t.TempDir(), "own.key")
	if err := grant.WritePrivateKey(own, newKey(t)); err != nil {
		t.Fatal(err)
	}
	if signingKey(t, own).Public().IsSSH() {
		t.Error("our own key is taken for one of OpenSSH")
	}
	if err := os.Remove(file + ".pub"); err != nil {
		t.Fatal(err)
	}
	for _, wrong := range []string{file, file + ".pub", filepath.Join(t.TempDir(), "none"), t.TempDir()} {
		_, err := grant.ReadSigningKey(wrong, io.Discard)
		if e, ok := errors.AsType[*policy.Error](err); !ok || e.Hint == "" {
			t.Errorf("%s: %v", wrong, err)
		}
	}
}

// TestSSHKeyDoesNotSign: a key that OpenSSH cannot use, and one whose halves do not fit.
func TestSSHKeyDoesNotSign(t *testing.T) {
	t.Setenv("SSH_AUTH_SOCK", "")
	t.Setenv("SSH_ASKPASS", "/bin/false")
	t.Setenv("SSH_ASKPASS_REQUIRE", "force")
	locked := sshKey(t, "ed25519", "a passphrase")
	if _, err := grant.Sign(t.Context(), goodPayload(), signingKey(t, locked)); !errors.Is(err, grant.ErrNotSigned) {
		t.Errorf("a locked key: %v", err)
	}
	one, other := sshKey(t, "ed25519", ""), sshKey(t, "ed25519", "")
	if err := os.Rename(other+".pub", one+".pub"); err != nil {
		t.Fatal(err)
	}
	if _, err := grant.Sign(t.Context(), goodPayload(), signingKey(t, one)); !errors.Is(err, grant.ErrNotSigned) {
		t.Errorf("halves of two keys: %v", err)
	}
}
