package userlogin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"golang.org/x/oauth2"
	"golang.org/x/sys/unix"
)

// Kept is a login as it is kept. Its tokens are secrets.
type Kept struct {
	Client Client `json:"client"`
	// Subject and Audience are what Token says, and Expires when it ends. Nobody has verified it but who takes it.
	Subject  string    `json:"subject"`
	Audience []string  `json:"audience,omitempty"`
	Expires  time.Time `json:"expires"`
	// Token is what services are shown.
	Token string `json:"token"`
	// Refresh brings a new one; empty: the provider gave none.
	Refresh string `json:"refresh,omitempty"`
}

// signatures are algorithms that a token may be signed with: nothing is verified by them here.
var signatures = []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.ES256, jose.ES384, jose.ES512, jose.EdDSA}

// read fills in what the token says. It was given by the provider itself, over TLS; services verify it.
func (k *Kept) read() error {
	parsed, err := jwt.ParseSigned(k.Token, signatures)
	if err != nil {
		if k.Client.Show == ShowAccess {
			return ErrOpaque
		}
		return fmt.Errorf("read the ID token: %w", err)
	}
	var c jwt.Claims
	if err := parsed.UnsafeClaimsWithoutVerification(&c); err != nil {
		return fmt.Errorf("read the token: %w", err)
	}
	if c.Expiry == nil {
		return errors.New("read the token: it says no time at which it ends")
	}
	k.Subject, k.Audience, k.Expires = c.Subject, c.Audience, c.Expiry.Time()
	return nil
}

// Store keeps logins, each in a file of its own that its owner alone can read.
type Store struct {
	// Dir is made when there is something to keep.
	Dir string
	// Now gives the wall clock; nil: time.Now.
	Now func() time.Time
}

func (s Store) now() time.Time {
	if s.Now == nil {
		return time.Now()
	}
	return s.Now()
}

func (s Store) path(name string) (string, error) {
	if name == "" || name != filepath.Base(name) || strings.HasPrefix(name, ".") || len(name) > 100 {
		return "", fmt.Errorf("%q is no name for a login", name)
	}
	return filepath.Join(s.Dir, name+".json"), nil
}

// Load reads a login.
func (s Store) Load(name string) (Kept, error) {
	var k Kept
	path, err := s.path(name)
	if err != nil {
		return k, err
	}
	k, mode, err := read(path)
	if errors.Is(err, fs.ErrNotExist) {
		return k, fmt.Errorf("%w as %s", ErrNoLogin, name)
	}
	if err == nil && mode.Perm()&0o077 != 0 {
		err = fmt.Errorf("%s can be read by others (mode %04o): log out and in again, for they may have the token", path, mode.Perm())
	}
	if err != nil {
		return Kept{}, fmt.Errorf("read login: %w", err)
	}
	return k, nil
}

// read takes a login from a file that nobody else can have written: who did could have us act as somebody else, and send what is in a
// file of ours, as the client's secret, to a provider of theirs.
func read(path string) (k Kept, mode fs.FileMode, err error) {
	f, err := os.Open(path)
	if err != nil {
		return k, 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return k, 0, err
	}
	if owner, ok := info.Sys().(*syscall.Stat_t); !ok || int(owner.Uid) != os.Geteuid() || info.Mode().Perm()&0o022 != 0 {
		return k, 0, fmt.Errorf("%s can be written by others (mode %04o): log out and in again", path, info.Mode().Perm())
	}
	if err := json.NewDecoder(f).Decode(&k); err != nil {
		return Kept{}, 0, fmt.Errorf("%s: %w", path, err)
	}
	return k, info.Mode(), nil
}

// Save writes a login whole, or leaves what was there. One that is being renewed just now does not come over it.
func (s Store) Save(name string, k Kept) error {
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return fmt.Errorf("keep login: %w", err)
	}
	unlock, err := s.lock(name)
	if err != nil {
		return err
	}
	defer unlock()
	return s.write(name, k)
}

// write is Save for who has the lock.
func (s Store) write(name string, k Kept) error {
	path, err := s.path(name)
	if err != nil {
		return err
	}
	text, err := json.MarshalIndent(k, "", "  ")
	if err != nil {
		return fmt.Errorf("keep login: %w", err)
	}
	f, err := os.CreateTemp(s.Dir, ".new-*") // mode 0600
	if err != nil {
		return fmt.Errorf("keep login: %w", err)
	}
	defer os.Remove(f.Name()) // it is gone when all went well
	_, err = f.Write(append(text, '\n'))
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("keep login: %w", err)
	}
	return nil
}

// Remove forgets a login, and gives what it was, for its provider to be told: all the more where others could read it. Of one that
// cannot be read, or that others could write, it gives nothing.
func (s Store) Remove(name string) (was Kept, err error) {
	path, err := s.path(name)
	if err != nil {
		return was, err
	}
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return was, fmt.Errorf("%w as %s", ErrNoLogin, name)
	}
	unlock, err := s.lock(name)
	if err != nil {
		return was, err
	}
	defer unlock()
	was, _, _ = read(path)
	return was, errors.Join(os.Remove(path), os.Remove(path+".lock")) // who waits for the lock finds no login
}

// Names lists the logins.
func (s Store) Names() ([]string, error) {
	found, err := filepath.Glob(filepath.Join(s.Dir, "*.json"))
	for i, path := range found {
		found[i] = strings.TrimSuffix(filepath.Base(path), ".json")
	}
	slices.Sort(found)
	return found, err
}

// ahead is how long before its end a token is renewed: a connection should begin with one that is of use.
const ahead = time.Minute

// Token gives a login whose token counts, renewed where that is due and can be done. Of several programs one renews: a provider
// takes a refresh token once.
func (s Store) Token(ctx context.Context, name string) (Kept, error) {
	k, err := s.Load(name)
	if err != nil || s.now().Before(k.Expires.Add(-ahead)) {
		return k, err
	}
	unlock, err := s.lock(name)
	if err != nil {
		return Kept{}, err
	}
	defer unlock()
	if k, err = s.Load(name); err != nil || s.now().Before(k.Expires.Add(-ahead)) {
		return k, err // another one has done it
	}
	next, err := k.renew(ctx)
	if next.Token != k.Token || next.Refresh != k.Refresh {
		if kept := s.write(name, next); kept != nil {
			return Kept{}, errors.Join(err, kept)
		}
	}
	switch {
	case err == nil:
		return next, nil
	case s.now().Before(k.Expires) && !errors.Is(err, ErrRefused):
		return next, nil // its token counts for a little longer
	case errors.Is(err, ErrRefused):
		return Kept{}, fmt.Errorf("%w: %w", ErrExpired, err)
	}
	return Kept{}, err
}

// renew asks the provider for a new token. What it gives is to be kept in any case: where the token is of no use, a provider may still
// have taken the old refresh token for the last time.
func (k Kept) renew(ctx context.Context) (Kept, error) {
	if k.Refresh == "" {
		return k, fmt.Errorf("%w: its token was valid until %s, and the provider gave nothing to renew it with", ErrRefused, k.Expires.UTC().Format(time.RFC3339))
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	p, err := Discover(ctx, k.Client)
	if err != nil {
		return k, err
	}
	t, err := p.config.TokenSource(p.context(ctx), &oauth2.Token{RefreshToken: k.Refresh}).Token()
	if err != nil {
		return k, judge("renew the login", err)
	}
	k.Refresh = t.RefreshToken
	next := Kept{Client: k.Client, Refresh: t.RefreshToken, Token: t.AccessToken}
	if k.Client.Show == ShowID {
		next.Token, _ = t.Extra("id_token").(string)
	}
	if next.Token == "" {
		return k, fmt.Errorf("%w: no new %s token comes with it", ErrRefused, k.Client.Show)
	}
	if err := next.read(); err != nil {
		return k, err
	}
	return next, nil
}

// lock is held by the one who renews.
func (s Store) lock(name string) (unlock func(), err error) {
	path, err := s.path(name)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock login: %w", err)
	}
	for {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock login: %w", err)
	}
	return func() { f.Close() }, nil
}
