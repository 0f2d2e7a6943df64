package e2e_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"
)

const (
	// soakRate is how many probes there are in a second if nothing else is said: two cores carry it
	// while programs are killed, started and replaced.
	soakRate = 1000
	// soakShort is what a run of all tests has time for.
	soakShort = 10 * time.Second
)

// soak is how long, how much, and by which dice.
type soak struct {
	probes   int
	duration time.Duration
	seed     uint64
	json     string // file of the report; empty: none
}

// soakSettings reads the environment, which `make soak-leaks` fills: SOAK_PROBES and SOAK_DURATION decide
// together or each alone, SOAK_SEED repeats the dice of another run.
func soakSettings(t *testing.T) soak {
	t.Helper()
	s := soak{seed: rand.Uint64(), json: os.Getenv("SOAK_JSON")}
	var err error
	if v := os.Getenv("SOAK_PROBES"); v != "" {
		s.probes, err = strconv.Atoi(v)
		must(t, err)
	}
	if v := os.Getenv("SOAK_DURATION"); v != "" {
		s.duration, err = time.ParseDuration(v)
		must(t, err)
	}
	if v := os.Getenv("SOAK_SEED"); v != "" {
		s.seed, err = strconv.ParseUint(v, 10, 64)
		must(t, err)
	}
	switch {
	case s.probes == 0 && s.duration == 0:
		s.duration = soakShort
		fallthrough
	case s.probes == 0:
		s.probes = int(s.duration.Seconds() * soakRate)
	case s.duration == 0:
		s.duration = time.Duration(s.probes) * time.Second / soakRate
	}
	return s
}

func (s soak) rate() float64 { return float64(s.probes) / s.duration.Seconds() }

// String is enough to run it again.
func (s soak) String() string {
	return fmt.Sprintf("SOAK_PROBES=%d SOAK_DURATION=%v SOAK_SEED=%d", s.probes, s.duration, s.seed)
}
