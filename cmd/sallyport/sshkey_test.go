package main

import (
	"errors"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// sshKey has OpenSSH make a key, and names its private half.
func makeSSHKey(t *testing.T, kind, passphrase string) (file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "id")
	if out, err := exec.CommandContext(t.Context(), "ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", "somebody here", "-f", file).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
	return file
}

func signingKey(t *testing.T, file string) grant.SigningKey {
	t.Helper()
	k, err := readSigningKey(file, io.Discard)
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
	alice := ownKey(t)
	bob, carol := signingKey(t, makeSSHKey(t, "ed25519", "")), signingKey(t, makeSSHKey(t, "ecdsa", ""))
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

func TestReadSigningKey(t *testing.T) {
	file := makeSSHKey(t, "ed25519", "")
	if a, b := signingKey(t, file), signingKey(t, file+".pub"); a.Public() != b.Public() || !a.Public().IsSSH() {
		t.Errorf("halves of one key: %v and %v", a.Public(), b.Public())
	}
	own := filepath.Join(t.TempDir(), "own.key")
	if err := grant.WritePrivateKey(own, ownKey(t)); err != nil {
		t.Fatal(err)
	}
	if signingKey(t, own).Public().IsSSH() {
		t.Error("our own key is taken for one of OpenSSH")
	}
	if err := os.Remove(file + ".pub"); err != nil {
		t.Fatal(err)
	}
	for _, wrong := range []string{file, file + ".pub", filepath.Join(t.TempDir(), "none"), t.TempDir()} {
		_, err := readSigningKey(wrong, io.Discard)
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
	locked := makeSSHKey(t, "ed25519", "a passphrase")
	if _, err := grant.Sign(t.Context(), goodPayload(), signingKey(t, locked)); !errors.Is(err, errNotSigned) {
		t.Errorf("a locked key: %v", err)
	}
	one, other := makeSSHKey(t, "ed25519", ""), makeSSHKey(t, "ed25519", "")
	if err := os.Rename(other+".pub", one+".pub"); err != nil {
		t.Fatal(err)
	}
	if _, err := grant.Sign(t.Context(), goodPayload(), signingKey(t, one)); !errors.Is(err, errNotSigned) {
		t.Errorf("halves of two keys: %v", err)
	}
}

func ownKey(t *testing.T) grant.PrivateKey {
	t.Helper()
	k, err := grant.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func goodPayload() grant.Payload {
	from := time.Now().UTC().Truncate(time.Second)
	return grant.Payload{ID: "01J8ZQ4X5M3T9V0Y2B7C6D1E4F", Requester: "alice", Service: "postgres", Binding: policy.BindingAddress,
		Addresses: []netip.Addr{netip.MustParseAddr("10.1.0.2")}, NotBefore: from, NotAfter: from.Add(time.Hour), Duration: 15 * time.Minute,
		Reason: "nightly backup", Audience: "node-1"}
}
