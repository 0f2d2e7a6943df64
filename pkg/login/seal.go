package login

import (
	"bytes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/crypto/chacha20poly1305"
)

// errSeal does not say what is wrong with a sealed text: whoever brings one that does not open is told nothing of it.
var errSeal = errors.New("it was not sealed here for this use")

// encoding is strict: without it the last character of a text has several spellings that open.
var encoding = base64.RawURLEncoding.Strict()

// Keys seal what a browser keeps for the proxy. The first seals, all open.
type Keys struct {
	open []cipher.AEAD
}

// KeysOf reads the keys of a file, or makes one that is kept in memory alone where none is named.
func KeysOf(file string) (*Keys, error) {
	if file == "" {
		return NewKeys(), nil
	}
	return ReadKeys(file)
}

// NewKeys makes a key that is kept in memory alone: with the process every session that it sealed ends.
func NewKeys() *Keys {
	key := make([]byte, chacha20poly1305.KeySize)
	_, _ = rand.Read(key) // it never fails: crypto/rand ends the process instead
	aead, _ := chacha20poly1305.NewX(key)
	return &Keys{open: []cipher.AEAD{aead}}
}

// ReadKeys reads keys that several proxies, or one after another, share: a line of base64 with 32 bytes for each, the newest
// first. A line put in front of the others changes the key and ends no session.
func ReadKeys(file string) (*Keys, error) {
	info, err := os.Stat(file)
	if err != nil {
		return nil, fmt.Errorf("read login keys: %w", err)
	}
	if info.Mode().Perm()&0o007 != 0 {
		return nil, fmt.Errorf("%s: others than its owner and group can use it; run `chmod o= %s`", file, file)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read login keys: %w", err)
	}
	k := &Keys{}
	for i, line := range slices.Collect(bytes.Lines(text)) {
		if line = bytes.TrimSpace(line); len(line) == 0 {
			continue
		}
		key, err := base64.StdEncoding.DecodeString(string(line))
		if err != nil || len(key) != chacha20poly1305.KeySize {
			return nil, fmt.Errorf("%s:%d: is not a key of %d bytes in base64; make one with `openssl rand -base64 %d`", file, i+1, chacha20poly1305.KeySize, chacha20poly1305.KeySize)
		}
		aead, _ := chacha20poly1305.NewX(key)
		k.open = append(k.open, aead)
	}
	if len(k.open) == 0 {
		return nil, fmt.Errorf("%s: has no key; make one with `openssl rand -base64 %d`", file, chacha20poly1305.KeySize)
	}
	return k, nil
}

// use is what a sealed text is for. It opens for exactly that: that of one service is nothing at another, and a state is no session.
type use struct {
	what, service, host string
	browser             string // of a state: the cookie of the browser that it was made for
}

func (u use) bytes() []byte {
	return []byte(strings.Join([]string{"sallyport", u.what, u.service, u.host, u.browser}, "\x00"))
}

// seal gives the value as text that only these keys open, for this use alone.
func (k *Keys) seal(u use, value any) (string, error) {
	plain, err := json.Marshal(value)
	if err != nil {
		return "", err
	}
	aead := k.open[0]
	nonce := make([]byte, aead.NonceSize(), aead.NonceSize()+len(plain)+aead.Overhead())
	_, _ = rand.Read(nonce)
	return encoding.EncodeToString(aead.Seal(nonce, nonce, plain, u.bytes())), nil
}

// unseal is the opposite of seal.
func (k *Keys) unseal(u use, text string, value any) error {
	sealed, err := encoding.DecodeString(text)
	if err != nil || len(sealed) < chacha20poly1305.NonceSizeX {
		return errSeal
	}
	for _, aead := range k.open {
		nonce, rest := sealed[:aead.NonceSize()], sealed[aead.NonceSize():]
		if plain, err := aead.Open(nil, nonce, rest, u.bytes()); err == nil {
			return json.Unmarshal(plain, value)
		}
	}
	return errSeal
}
