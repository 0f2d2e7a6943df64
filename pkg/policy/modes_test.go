package policy_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// TestEnforceIsNotWritten: the default mode is not in what is encoded, signed and handed to the proxy: it may know of no modes.
func TestEnforceIsNotWritten(t *testing.T) {
	unwritten := mustParse(t, good)
	written := mustParse(t, strings.Replace(good, "target: Host", "target: Host\n  mode: Enforce", 1))
	if written.Digest() != unwritten.Digest() || bytes.Contains(written.YAML(), []byte("mode:")) {
		t.Errorf("digests %s and %s\n%s", written.Digest(), unwritten.Digest(), written.YAML())
	}
	if s, _ := written.Service("postgres"); s.Spec.Mode != policy.ModeEnforce {
		t.Errorf("mode is %q", s.Spec.Mode)
	}
	shadowed := mustParse(t, strings.Replace(good, "target: Host", "target: Host\n  mode: Shadow", 1))
	if shadowed.Digest() == unwritten.Digest() || !bytes.Contains(shadowed.YAML(), []byte("mode: Shadow")) {
		t.Errorf("a mode is not in the digest\n%s", shadowed.YAML())
	}
}
