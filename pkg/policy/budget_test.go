package policy_test

import (
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

func TestSize(t *testing.T) {
	for text, want := range map[string]policy.Size{
		"0B": 0, "1B": 1, "1023B": 1023, "1KiB": 1 << 10, "512MiB": 512 << 20, "10GiB": 10 << 30, "3TiB": 3 << 40, "1048576TiB": policy.MaxSize,
	} {
		var s policy.Size
		if err := s.UnmarshalText([]byte(text)); err != nil || s != want || s.String() != text {
			t.Errorf("%s reads as %d (%s), %v", text, s, s, err)
		}
	}
	for _, text := range []string{"", "10", "GiB", "-1B", "+1B", "1.5GiB", "01B", "1 GiB", "1GB", "1gib", "1048577TiB", "99999999999999999999B"} {
		s := policy.Size(7)
		if err := s.UnmarshalText([]byte(text)); err == nil || s != 7 {
			t.Errorf("%q reads as %s, %v", text, s, err)
		}
	}
}

func TestBudgetInWords(t *testing.T) {
	for want, b := range map[string]policy.Budget{
		"unlimited":                         {},
		"10GiB, 5 connections":              {Bytes: 10 << 30, Connections: 5},
		"7 packets, 2 connections a second": {Packets: 7, ConnectionsPerSecond: 2},
	} {
		if b.String() != want {
			t.Errorf("%+v reads %q, want %q", b, b, want)
		}
	}
}
