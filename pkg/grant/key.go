package grant

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// Errors about files of private keys. Each comes inside a *policy.Error that names the next step.
var (
	ErrKeyMode = errors.New("private key is open to others")
	ErrKeyFile = errors.New("not a private key")
)

const (
	pemType    = "PRIVATE KEY"
	maxKeyFile = 16 << 10
)

// PrivateKey is an Ed25519 key that signs grants. It never shows itself when it is printed.
type PrivateKey struct{ key ed25519.PrivateKey }

// GenerateKey makes a new key.
func GenerateKey() (PrivateKey, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return PrivateKey{}, fmt.Errorf("generate key: %w", err)
	}
	return PrivateKey{key}, nil
}

// Public is the key's public half, as it stands in a Keyring.
func (k PrivateKey) Public() policy.PublicKey {
	if k.isZero() {
		return policy.PublicKey{}
	}
	public, ok := k.key.Public().(ed25519.PublicKey)
	if !ok {
		return policy.PublicKey{}
	}
	out, err := policy.NewPublicKey(public)
	if err != nil {
		return policy.PublicKey{}
	}
	return out
}

// hidden is what a private key shows of itself.
const hidden = "(private key)"

// Format hides the key from every verb of fmt.
func (k PrivateKey) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, hidden) }

// MarshalText hides the key from encoders.
func (k PrivateKey) MarshalText() ([]byte, error) { return []byte(hidden), nil }

func (k PrivateKey) isZero() bool { return len(k.key) != ed25519.PrivateKeySize }

func errNoKey() error {
	return &policy.Error{Field: "key", Msg: "there is no private key", Hint: "make one with `sallyport keygen`", Err: ErrKeyFile}
}

// Sign signs a message.
func (k PrivateKey) Sign(_ context.Context, message []byte) ([]byte, error) {
	if k.isZero() {
		return nil, errNoKey()
	}
	return ed25519.Sign(k.key, message), nil
}

// WritePrivateKey makes the file, readable by its owner alone, in PEM (PKCS #8). It fails if the
// file is there already, and leaves nothing behind when it fails.
func WritePrivateKey(path string, k PrivateKey) (err error) {
	if k.isZero() {
		return errNoKey()
	}
	der, err := x509.MarshalPKCS8PrivateKey(k.key)
	if err != nil {
		return fmt.Errorf("encode private key: %w", err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return &policy.Error{File: path, Msg: "the file is there already", Hint: "choose another name: a key is never overwritten", Err: err}
	}
	if err != nil {
		return fmt.Errorf("write private key: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("write private key: %w", err), os.Remove(path))
		}
	}()
	return errors.Join(pem.Encode(f, &pem.Block{Type: pemType, Bytes: der}), f.Sync(), f.Close())
}

// ReadPrivateKey reads a key in PEM (PKCS #8). It refuses a file that anybody but its owner can
// read or write (ErrKeyMode), and one that holds no Ed25519 key (ErrKeyFile).
func ReadPrivateKey(path string) (PrivateKey, error) {
	data, err := readSecret(path)
	if err != nil {
		return PrivateKey{}, err
	}
	block, rest := pem.Decode(data)
	if block == nil || block.Type != pemType || len(rest) > 0 {
		return PrivateKey{}, notAKey(path, "it is not one PEM block of type "+pemType)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return PrivateKey{}, notAKey(path, "it is not in PKCS #8")
	}
	key, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return PrivateKey{}, notAKey(path, fmt.Sprintf("it is a %T, not an Ed25519 key", parsed))
	}
	return PrivateKey{key}, nil
}

func notAKey(path, why string) error {
	return &policy.Error{File: path, Msg: "read private key: " + why, Hint: "make one with `sallyport keygen`", Err: ErrKeyFile}
}

// readSecret looks at the mode of the very file that it reads.
func readSecret(path string) ([]byte, error) {
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		return nil, notAKey(path, "it is not a regular file")
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, &policy.Error{File: path, Msg: "read private key: " + cause(err), Hint: "check the path, and who owns the file", Err: err}
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read private key: %w", err)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, &policy.Error{
			File: path, Msg: fmt.Sprintf("the private key has the mode %04o: others can get at it", mode),
			Hint: "chmod 600 " + filepath.Clean(path), Err: ErrKeyMode,
		}
	}
	data, err := io.ReadAll(io.LimitReader(f, maxKeyFile))
	if err != nil {
		return nil, fmt.Errorf("read private key: %w", err)
	}
	return data, nil
}

func cause(err error) string {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err.Error()
	}
	return err.Error()
}
