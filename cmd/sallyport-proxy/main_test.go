package main

import (
	"bytes"
	"strings"
	"testing"
)

// TestVersion: what was asked for is on standard output, as with the other programs.
func TestVersion(t *testing.T) {
	var out, errs bytes.Buffer
	err := run(t.Context(), environment{args: []string{"sallyport-proxy", "--version"}, stdout: &out, stderr: &errs})
	if err != nil || !strings.HasPrefix(out.String(), "sallyport-proxy version ") || errs.Len() > 0 {
		t.Errorf("%v: %q, and on standard error %q", err, out.String(), errs.String())
	}
}
