package token

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// pace of fetching a key set.
type pace struct {
	every time.Duration // while all is well; up to a fifth less, at random
	retry time.Duration // after the first failure; doubles, up to every
	floor time.Duration // between fetches that requests ask for, whatever the keys that they name
	wait  time.Duration // of a request
	fetch time.Duration // of one attempt, all of it
}

var defaultPace = pace{every: 5 * time.Minute, retry: time.Second, floor: 10 * time.Second, wait: 2 * time.Second, fetch: 10 * time.Second}

// keySet is the keys of one provider. Its run alone fetches; requests look, ask for newer ones, and wait a little.
type keySet struct {
	from  origin
	get   func(context.Context) ([]jose.JSONWebKey, error)
	clock func() time.Time
	log   *slog.Logger
	pace  pace
	want  chan struct{} // has room for one

	ctx    context.Context    // of run; nil until Verifier starts it, guarded by Verifier.mu till then
	cancel context.CancelFunc // guarded by Verifier.mu

	mu       sync.Mutex
	keys     []jose.JSONWebKey // guarded by mu; of the last fetch that went well
	fetched  time.Time         // guarded by mu; wall clock of that
	tried    time.Time         // guarded by mu; when the last attempt began, or was asked for
	fetching bool              // guarded by mu
	err      error             // guarded by mu; of the last attempt
	told     string            // guarded by mu; what was logged last
	settled  chan struct{}     // guarded by mu; closed and replaced after every attempt

	seen map[[sha256.Size]byte]struct{} // guarded by mu; tokens that one of keys has signed
}

func newKeySet(from origin, cfg Config, p pace) *keySet {
	k := &keySet{from: from, clock: cfg.Clock, log: cfg.Logger, pace: p, want: make(chan struct{}, 1), settled: make(chan struct{}),
		seen: make(map[[sha256.Size]byte]struct{})}
	k.get = func(ctx context.Context) ([]jose.JSONWebKey, error) { return from.fetch(ctx, cfg.Dial) }
	return k
}

// end stops fetching. Verifier.mu is held.
func (k *keySet) end() {
	if k.cancel != nil {
		k.cancel()
	}
}

// run fetches until the set is ended.
func (k *keySet) run() {
	failures := 0
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-k.want:
		case <-k.ctx.Done():
			return
		}
		if k.attempt() {
			failures = 0
		} else {
			failures++
		}
		timer.Reset(k.pause(failures))
	}
}

func (k *keySet) pause(failures int) time.Duration {
	d := k.pace.every
	if failures > 0 {
		d = min(d, k.pace.retry<<min(failures-1, 20))
	}
	return d - rand.N(d/5+1)
}

func (k *keySet) attempt() bool {
	k.mu.Lock()
	k.fetching, k.tried = true, time.Now()
	k.mu.Unlock()
	ctx, cancel := context.WithTimeout(k.ctx, k.pace.fetch)
	defer cancel()
	keys, err := k.get(ctx)
	k.mu.Lock()
	defer k.mu.Unlock()
	select { // who asked meanwhile is served by this attempt
	case <-k.want:
	default:
	}
	if k.err = err; err == nil {
		k.keys, k.fetched = keys, k.clock().Round(0)
		clear(k.seen)
	} else {
		k.err = errors.New(quote(err.Error())) // it has words of the provider's
	}
	k.fetching = false
	close(k.settled)
	k.settled = make(chan struct{})
	k.tell()
	return err == nil
}

// tell logs a change of trouble, once. k.mu is held.
func (k *keySet) tell() {
	trouble := "none"
	if k.err != nil {
		trouble = k.err.Error()
	}
	if trouble == k.told || k.ctx.Err() != nil {
		return
	}
	k.told = trouble
	if k.err != nil {
		k.log.Warn("keys of identity provider not fetched", "provider", k.from.name, "error", trouble, "last", k.fetched)
		return
	}
	k.log.Info("keys of identity provider fetched", "provider", k.from.name, "keys", len(k.keys))
}

// find gives the keys that can have signed the token. Where there is none it has them fetched anew and waits for that,
// unless that was done just now.
func (k *keySet) find(ctx context.Context, t examined, now time.Time, keep time.Duration) (found []jose.JSONWebKey, fetched time.Time, err error) {
	found, fetched, settled, err := k.look(t, now, keep)
	if err == nil || settled == nil {
		return found, fetched, err
	}
	timer := time.NewTimer(k.pace.wait)
	defer timer.Stop()
	select {
	case <-settled:
		found, fetched, _, err = k.look(t, now, keep)
	case <-timer.C:
	case <-ctx.Done():
	}
	return found, fetched, err
}

// maxSeen bounds the tokens whose signature is remembered: 32 bytes and little more each.
const maxSeen = 8192

// signed tells whether the token was seen before that has this hash, since the keys were fetched, and these still count.
func (k *keySet) signed(sum [sha256.Size]byte, now time.Time, keep time.Duration) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	_, seen := k.seen[sum]
	return seen && now.Sub(k.fetched) <= keep
}

// remember that a key of those which were fetched then has signed the token, unless there are others by now.
func (k *keySet) remember(sum [sha256.Size]byte, fetched time.Time) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !fetched.Equal(k.fetched) {
		return
	}
	if len(k.seen) >= maxSeen {
		clear(k.seen)
	}
	k.seen[sum] = struct{}{}
}

// look gives what there is. Where that is not enough, settled is closed after the next attempt; nil: there will be none soon.
func (k *keySet) look(t examined, now time.Time, keep time.Duration) (found []jose.JSONWebKey, fetched time.Time, settled <-chan struct{}, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if age := now.Sub(k.fetched); k.fetched.IsZero() || age > keep {
		err = k.missing(age, keep)
	} else if found = fitting(k.keys, t); len(found) == 0 {
		err = fmt.Errorf("%w: %s has no key %s for %s", ErrSignature, k.from.name, quote(t.keyID), t.algorithm)
	}
	if err != nil && k.ask() {
		settled = k.settled
	}
	return found, k.fetched, settled, err
}

// ask has run fetch, if it may do so now, and tells whether an attempt is under way or comes. k.mu is held.
func (k *keySet) ask() bool {
	if k.fetching {
		return true
	}
	now := time.Now()
	if !k.tried.IsZero() && now.Sub(k.tried) < k.pace.floor {
		return len(k.want) > 0
	}
	select {
	case k.want <- struct{}{}:
		k.tried = now
	default:
	}
	return true
}

// missing says why no key counts. k.mu is held.
func (k *keySet) missing(age, keep time.Duration) error {
	cause := "not fetched yet"
	if k.err != nil {
		cause = k.err.Error()
	}
	if k.fetched.IsZero() {
		return fmt.Errorf("%w: %s: %s", ErrNoKeys, k.from.name, cause)
	}
	return fmt.Errorf("%w: those of %s are %s old, and count for %s: %s", ErrNoKeys, k.from.name, age.Round(time.Second), keep, cause)
}

// fitting are the keys of a token's key id, or the only one where it names none, that its algorithm is for.
func fitting(keys []jose.JSONWebKey, t examined) (found []jose.JSONWebKey) {
	for _, key := range keys {
		if (t.keyID == "" || key.KeyID == t.keyID) && (key.Algorithm == "" || key.Algorithm == t.algorithm) && signs(key.Key, t.algorithm) {
			found = append(found, key)
		}
	}
	if t.keyID == "" && len(found) > 1 || len(found) > maxSameID {
		return nil
	}
	return found
}

// maxSameID bounds how many signatures one token can have us verify.
const maxSameID = 3

// signs tells whether a key is of the kind that an algorithm takes.
func signs(key any, algorithm string) bool {
	switch key.(type) {
	case *rsa.PublicKey:
		return strings.HasPrefix(algorithm, "RS") || strings.HasPrefix(algorithm, "PS")
	case *ecdsa.PublicKey:
		return strings.HasPrefix(algorithm, "ES")
	case ed25519.PublicKey:
		return algorithm == string(jose.EdDSA)
	}
	return false
}
