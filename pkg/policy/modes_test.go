package policy_test

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// TestServiceAtOfModes: where a service of the node and one of a pod have the same port, what is enforced comes first, whoever
// has the exact address.
func TestServiceAtOfModes(t *testing.T) {
	for _, c := range []struct{ host, pod, want string }{
		{"Enforce", "Enforce", "cache"},
		{"Enforce", "Shadow", "postgres"},
		{"Enforce", "Observe", "postgres"},
		{"Shadow", "Enforce", "cache"},
		{"Observe", "Shadow", "cache"},
		{"Shadow", "Observe", "cache"},
	} {
		s := mustParse(t, strings.NewReplacer("ports: [5432]", "ports: [5432, 6379]", "target: Host", "target: Host\n  mode: "+c.host, "target: Pod", "target: Pod\n  mode: "+c.pod).Replace(good))
		at := netip.MustParseAddrPort("10.2.0.2:6379")
		if svc, ok := s.ServiceAt(policy.ProtocolTCP, at); !ok || svc.Name != c.want {
			t.Errorf("host %s, pod %s: belongs to %q, want %q", c.host, c.pod, svc.Name, c.want)
		}
		if svc, ok := s.PodServiceAt(policy.ProtocolTCP, at); !ok || svc.Name != "cache" {
			t.Errorf("host %s, pod %s: in a pod it belongs to %q", c.host, c.pod, svc.Name)
		}
		if svc, ok := s.PodServiceAt(policy.ProtocolTCP, netip.MustParseAddrPort("10.2.0.3:6379")); ok {
			t.Errorf("host %s: %s is in a pod", c.host, svc.Name)
		}
	}
}

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
