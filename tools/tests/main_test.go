package main

import (
	"slices"
	"strings"
	"testing"
)

func TestSkipsAreFound(t *testing.T) {
	log := `{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestA","Output":"--- SKIP"}
{"Action":"skip","Package":"p","Test":"TestA","Elapsed":0}
{"Action":"skip","Package":"empty"}
{"Action":"pass","Package":"p","Test":"TestB"}
{"Action":"skip","Package":"p","Test":"TestC/IPv6"}
{"Action":"output","Package":"p","Test":"TestD","Output":"    d_test.go:1: this kernel has no IPIP devices\n"}
{"Action":"skip","Package":"p","Test":"TestD"}
`
	got, err := skips(strings.NewReader(log))
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"p TestA", "p TestC/IPv6"}; !slices.Equal(got, want) {
		t.Errorf("skips are %q, want %q: a package without tests is none, and a kernel without devices is excused", got, want)
	}
	if _, err := skips(strings.NewReader("not JSON")); err == nil {
		t.Error("a log that is no event stream was read")
	}
}
