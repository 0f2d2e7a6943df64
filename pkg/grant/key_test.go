package grant_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// dsseKey lets the DSSE library verify with one of our keys.
type dsseKey struct{ policy.PublicKey }

func (k dsseKey) KeyID() (string, error)   { return k.ID(), nil }
func (k dsseKey) Public() crypto.PublicKey { return nil }
func (k dsseKey) Verify(_ context.Context, data, sig []byte) error {
	if !k.PublicKey.Verify(data, sig) {
		return errors.New("does not verify")
	}
	return nil
}

func TestPrivateKeyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key.pem")
	k := newKey(t)
	if err := grant.WritePrivateKey(path, k); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode is %v, %v", info.Mode(), err)
	}
	back, err := grant.ReadPrivateKey(path)
	if err != nil || back.Public() != k.Public() {
		t.Errorf("another key comes back: %v", err)
	}
	if _, err := grant.Sign(t.Context(), goodPayload(), back); err != nil {
		t.Error(err)
	}
	err = grant.WritePrivateKey(path, newKey(t))
	if e, ok := errors.AsType[*policy.Error](err); !ok || !errors.Is(err, fs.ErrExist) || e.Hint == "" {
		t.Errorf("overwriting gives %v", err)
	}
	if again, err := grant.ReadPrivateKey(path); err != nil || again.Public() != k.Public() {
		t.Error("the key was overwritten")
	}
}

func TestWritePrivateKeyWrong(t *testing.T) {
	dir := t.TempDir()
	if err := grant.WritePrivateKey(filepath.Join(dir, "none", "key.pem"), newKey(t)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	if err := grant.WritePrivateKey(filepath.Join(dir, "zero.pem"), grant.PrivateKey{}); err == nil {
		t.Error("wrote no key")
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left %v behind", left)
	}
}

func TestReadPrivateKeyMode(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key.pem")
	if err := grant.WritePrivateKey(path, newKey(t)); err != nil {
		t.Fatal(err)
	}
	for _, mode := range []fs.FileMode{0o604, 0o640, 0o644, 0o620, 0o602, 0o601, 0o777} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		_, err := grant.ReadPrivateKey(path)
		e, ok := errors.AsType[*policy.Error](err)
		if !ok || !errors.Is(err, grant.ErrKeyMode) || e.File != path || e.Hint != "chmod 600 "+path || !strings.Contains(e.Msg, fmt.Sprintf("%04o", mode)) {
			t.Errorf("mode %04o gives %+v", mode, err)
		}
	}
	for _, mode := range []fs.FileMode{0o600, 0o400, 0o700} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := grant.ReadPrivateKey(path); err != nil {
			t.Errorf("mode %04o gives %v", mode, err)
		}
	}
}

func TestReadPrivateKeyWrong(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := file("good", nil)
	if err := errors.Join(os.Remove(good), grant.WritePrivateKey(good, newKey(t))); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, path string
		sentinel   error
	}{
		{"missing", filepath.Join(dir, "none"), fs.ErrNotExist},
		{"directory", dir, grant.ErrKeyFile},
		{"pipe", pipe, grant.ErrKeyFile},
		{"empty", file("empty", nil), grant.ErrKeyFile},
		{"no PEM", file("text", []byte("secret")), grant.ErrKeyFile},
		{"cut off", file("cut", whole[:40]), grant.ErrKeyFile},
		{"two keys", file("two", append(append([]byte{}, whole...), whole...)), grant.ErrKeyFile},
		{"damaged", file("damaged", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte{1, 2}})), grant.ErrKeyFile},
		{"another block", file("cert", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{1, 2}})), grant.ErrKeyFile},
		{"another kind of key", file("ecdsa", ecdsaKey(t)), grant.ErrKeyFile},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := grant.ReadPrivateKey(c.path)
			e, ok := errors.AsType[*policy.Error](err)
			if !ok || !errors.Is(err, c.sentinel) || e.File != c.path || e.Hint == "" {
				t.Errorf("got %+v", err)
			}
		})
	}
}

func ecdsaKey(t *testing.T) []byte {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func TestPrivateKeyHidesItself(t *testing.T) {
	k := newKey(t)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%d", "%q"} {
		if got := fmt.Sprintf(verb, k); got != "(private key)" {
			t.Errorf("%s shows %s", verb, got)
		}
	}
	if raw, err := json.Marshal(map[string]any{"k": k}); err != nil || string(raw) != `{"k":"(private key)"}` {
		t.Errorf("JSON shows %s, %v", raw, err)
	}
}

func TestZeroPrivateKey(t *testing.T) {
	var k grant.PrivateKey
	if !k.Public().IsZero() {
		t.Error("no key has a public half")
	}
	if _, err := grant.Sign(t.Context(), goodPayload(), k); !errors.Is(err, grant.ErrKeyFile) {
		t.Errorf("signed with no key: %v", err)
	}
}
