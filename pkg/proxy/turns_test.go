package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func from(n int) netip.Prefix {
	return netip.MustParsePrefix(fmt.Sprintf("192.0.2.%d/32", n))
}

// wait has handshakes wait for the one turn, in this order, and tells in which they had it. It runs in a bubble.
func wait(t *testing.T, turns *turns, who []netip.Prefix) (had []netip.Prefix) {
	t.Helper()
	for _, w := range who {
		go func() {
			if err := turns.take(t.Context(), w, time.Now().Add(time.Hour)); err != nil {
				t.Error(err)
			}
			had = append(had, w) // the turn guards it
			turns.give()
		}()
		synctest.Wait()
	}
	turns.give()
	synctest.Wait()
	return had
}

// busy is one turn, which somebody has.
func busy(t *testing.T) *turns {
	t.Helper()
	turns := newTurns(1)
	if err := turns.take(t.Context(), from(0), time.Now()); err != nil {
		t.Fatal(err)
	}
	return turns
}

func TestTurnsGoFirstToWhoWasLetIn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns := busy(t)
		good, bad, other := from(1), from(2), from(3)
		turns.remember(good, welcome, "good", time.Now())
		turns.remember(bad, refused, "", time.Now())
		had := wait(t, turns, []netip.Prefix{bad, other, good})
		if want := []netip.Prefix{good, other, bad}; !slices.Equal(had, want) {
			t.Errorf("turns went to %v, want %v", had, want)
		}
	})
}

func TestNobodyWaitsForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns := busy(t)
		good, bad, other := from(1), from(2), from(3)
		turns.remember(good, welcome, "good", time.Now())
		turns.remember(bad, refused, "", time.Now())
		had := wait(t, turns, append([]netip.Prefix{bad, other}, slices.Repeat([]netip.Prefix{good}, 40)...))
		if i := slices.Index(had, other); i < 1 || i >= turnsOfUnknown {
			t.Errorf("the unknown one had turn %d: %v", i, had)
		}
		if i := slices.Index(had, bad); i < turnsOfUnknown || i >= turnsOfRefused {
			t.Errorf("the refused one had turn %d: %v", i, had)
		}
	})
}

func TestCallersTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns := busy(t)
		good, many := from(1), []netip.Prefix{from(2), from(3), from(4)}
		turns.remember(good, welcome, "good", time.Now())
		for _, m := range many {
			turns.remember(m, welcome, "many", time.Now())
		}
		had := wait(t, turns, append(slices.Repeat(many, 10), good))
		if i := slices.Index(had, good); i > 1 {
			t.Errorf("the one of another caller had turn %d: %v", i, had)
		}
	})
}

// Who gives up keeps no turn, and gets none.
func TestTurnsAreNotLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns := busy(t)
		if err := turns.take(t.Context(), from(1), time.Now().Add(time.Second)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("waiting too long is %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		if err := turns.take(ctx, from(1), time.Now().Add(time.Hour)); !errors.Is(err, context.Canceled) {
			t.Errorf("waiting after the end is %v", err)
		}
		turns.give()
		if err := turns.take(t.Context(), from(2), time.Now()); err != nil {
			t.Errorf("the free turn is gone: %v", err)
		}
		turns.give()
		if turns.free != 1 {
			t.Errorf("%d turns, there was one", turns.free)
		}
	})
}

func TestTurnsForget(t *testing.T) {
	turns, now := newTurns(1), time.Now()
	turns.remember(from(1), welcome, "good", now)
	turns.remember(from(2), refused, "", now.Add(rememberFor+1))
	if s := turns.standing(from(1)); s != welcome {
		t.Errorf("who was let in a minute ago is %v", s)
	}
	turns.remember(from(3), refused, "", now.Add(3*rememberFor))
	if s := turns.standing(from(1)); s != unknown {
		t.Errorf("who was let in long ago is %v", s)
	}
	for i := range 3 * rememberMost {
		turns.remember(netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 32), refused, "", now.Add(3*rememberFor))
	}
	if n := len(turns.known[0]) + len(turns.known[1]); n > 2*rememberMost {
		t.Errorf("%d neighbourhoods are remembered", n)
	}
}

// TestRefusalsPushOutNobody: whoever fails in many places, which costs little, has nobody forgotten who was let in.
func TestRefusalsPushOutNobody(t *testing.T) {
	turns, now := newTurns(1), time.Now()
	turns.remember(from(1), welcome, "good", now)
	turns.remember(from(2), welcome, "turned", now)
	for i := range 3 * rememberMost {
		turns.remember(netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 32), refused, "", now)
	}
	if s := turns.standing(from(1)); s != welcome {
		t.Errorf("who was let in just now is %v", s)
	}
	turns.remember(from(2), refused, "", now)
	if s := turns.standing(from(2)); s != refused {
		t.Errorf("who was let in, and is refused now, is %v", s)
	}
	turns.remember(from(3), welcome, "new", now)
	if s := turns.standing(from(3)); s != welcome {
		t.Errorf("who is let in now is %v", s)
	}
}
