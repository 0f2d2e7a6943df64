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
`
	got, err := skips(strings.NewReader(log))
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"p TestA", "p TestC/IPv6"}; !slices.Equal(got, want) {
		t.Errorf("skips are %q, want %q: a package without tests is none", got, want)
	}
	if _, err := skips(strings.NewReader("not JSON")); err == nil {
		t.Error("a log that is no event stream was read")
	}
}
