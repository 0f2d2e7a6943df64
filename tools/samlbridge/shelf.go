package main

import (
	"crypto/rand"
	"maps"
	"sync"
	"time"
)

// maxShelf bounds what is kept for people who are on their way.
const maxShelf = 10_000

// shelf keeps things until they are taken, once, or run out.
type shelf[T any] struct {
	mu    sync.Mutex
	items map[string]item[T] // guarded by mu
}

type item[T any] struct {
	thing T
	until time.Time
}

// put keeps a thing under a new random key. It is empty when there is no room.
func (s *shelf[T]) put(thing T, now, until time.Time) string {
	key := rand.Text()
	if !s.keep(key, thing, now, until) {
		return ""
	}
	return key
}

// keep keeps a thing under a key, and says whether it could: not when the key is taken, nor when there is no room.
func (s *shelf[T]) keep(key string, thing T, now, until time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.items == nil {
		s.items = map[string]item[T]{}
	}
	if len(s.items) >= maxShelf {
		maps.DeleteFunc(s.items, func(_ string, i item[T]) bool { return !now.Before(i.until) })
	}
	if old, there := s.items[key]; len(s.items) >= maxShelf || there && now.Before(old.until) {
		return false
	}
	s.items[key] = item[T]{thing, until}
	return true
}

// take gives a thing out, and never again.
func (s *shelf[T]) take(key string, now time.Time) (T, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, ok := s.items[key]
	delete(s.items, key)
	return i.thing, ok && now.Before(i.until)
}
