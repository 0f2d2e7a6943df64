package privilege

import (
	"errors"
	"strings"
	"testing"
)

func all() []Set { return []Set{Agent(), Guard(), Launcher()} }

func mask(s Set) (m uint64) {
	for _, c := range s.Capabilities {
		m |= 1 << c.number
	}
	return m
}

func TestEachMissingCapabilityIsNamed(t *testing.T) {
	for _, s := range all() {
		if err := s.check(mask(s)); err != nil {
			t.Errorf("%s with exactly its set: %v", s.Process, err)
		}
		for _, gone := range s.Capabilities {
			err := s.check(mask(s) &^ (1 << gone.number))
			if !errors.Is(err, ErrMissing) || !strings.Contains(err.Error(), gone.Name+" (") {
				t.Errorf("%s without %s: %v", s.Process, gone.Name, err)
			}
			for _, other := range s.Capabilities {
				if other != gone && strings.Contains(err.Error(), other.Name) {
					t.Errorf("%s without %s: names %s too: %v", s.Process, gone.Name, other.Name, err)
				}
			}
		}
	}
}

func TestAllMissingAreNamed(t *testing.T) {
	for _, s := range all() {
		err := s.check(0)
		for _, c := range s.Capabilities {
			if !strings.Contains(err.Error(), c.Name) {
				t.Errorf("%s without any: %v", s.Process, err)
			}
		}
		if !strings.Contains(s.Hint(), s.Unit) || !strings.Contains(s.Hint(), s.String()) {
			t.Errorf("hint: %s", s.Hint())
		}
	}
}
