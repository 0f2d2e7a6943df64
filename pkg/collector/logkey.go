package collector

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/oklog/ulid/v2"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/mod/sumdb/note"

	"github.com/sallyport-dev/sallyport/pkg/proof"
)

// Files of the key, beside the days. The private one has both halves, a line each.
const (
	keyFile       = "log.key"
	publicKeyFile = "log.pub"
)

// logKey signs the log's checkpoints. Its name is the log's origin.
type logKey struct {
	note.Signer
	note.Verifier
	vkey string
}

// Name is the origin, for signer and verifier alike.
func (k logKey) Name() string { return k.Signer.Name() }

// KeyHash is that of signer and verifier.
func (k logKey) KeyHash() uint32 { return k.Signer.KeyHash() }

// openLogKey reads the key of a directory, and makes it where nothing was stored yet. Records without their key are not gone on with:
// a second log over the same records would look like a forged one.
func openLogKey(dir string, td spiffeid.TrustDomain) (logKey, error) {
	text, err := os.ReadFile(filepath.Join(dir, keyFile))
	if errors.Is(err, fs.ErrNotExist) {
		text, err = makeLogKey(dir, td)
	}
	if err != nil {
		return logKey{}, err
	}
	k, err := parseLogKey(text)
	if err != nil {
		return logKey{}, fmt.Errorf("read %s: %w", filepath.Join(dir, keyFile), err)
	}
	return k, k.publish(filepath.Join(dir, publicKeyFile))
}

// publish writes the public half, unless it is there: a start on a full disk is not to fail because of it.
func (k logKey) publish(path string) error {
	text := []byte(k.vkey + "\n")
	if have, err := os.ReadFile(path); err == nil && bytes.Equal(have, text) {
		return nil
	}
	return writeWhole(path, text, 0o644)
}

// hadKey tells whether there is anything that a log left: a day, one that was set aside as well, or the public half of its key.
func hadKey(dir string) (bool, error) {
	for _, pattern := range []string{"*" + daySuffix + "*", publicKeyFile} {
		if names, err := fs.Glob(os.DirFS(dir), pattern); err != nil || len(names) > 0 {
			return len(names) > 0, err
		}
	}
	return false, nil
}

func makeLogKey(dir string, td spiffeid.TrustDomain) ([]byte, error) {
	switch had, err := hadKey(dir); {
	case err != nil:
		return nil, err
	case had:
		return nil, fmt.Errorf("%s has records of a log and no %s: put the key back, or move the records away and begin with an empty directory", dir, keyFile)
	}
	skey, vkey, err := note.GenerateKey(rand.Reader, proof.LogSigner(td.Name(), ulid.Make().String()))
	if err != nil {
		return nil, err
	}
	text := []byte(skey + "\n" + vkey + "\n")
	return text, writeWhole(filepath.Join(dir, keyFile), text, 0o600)
}

func parseLogKey(text []byte) (k logKey, err error) {
	skey, rest, _ := strings.Cut(string(text), "\n")
	k.vkey = strings.TrimSuffix(rest, "\n")
	if k.Signer, err = note.NewSigner(skey); err != nil {
		return logKey{}, err
	}
	if k.Verifier, err = note.NewVerifier(k.vkey); err != nil {
		return logKey{}, err
	}
	if k.Signer.Name() != k.Verifier.Name() || k.Signer.KeyHash() != k.Verifier.KeyHash() {
		return logKey{}, errors.New("its two halves are of different keys")
	}
	return k, nil
}

// writeWhole replaces a file: whoever looks finds the old one, the new one or none, and it is durable when this returns.
func writeWhole(path string, data []byte, mode fs.FileMode) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, werr := f.Write(data)
	if err := errors.Join(werr, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
