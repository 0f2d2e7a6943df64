package main

import (
	"os/exec"
	"testing"
)

func TestDebianVersions(t *testing.T) {
	order := []release{{version: "dev", commit: "abcdef0123456789"}, {version: "v0.1.0"}, {version: "v0.1.0-3-gabc"}, {version: "0.2.0"}}
	for i := range order[1:] {
		a, b := order[i].debian(), order[i+1].debian()
		if err := exec.Command("dpkg", "--compare-versions", a, "lt", b).Run(); err != nil {
			t.Errorf("dpkg takes %s not for older than %s", a, b)
		}
	}
}
