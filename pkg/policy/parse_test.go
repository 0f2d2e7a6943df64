package policy_test

import (
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// good is a set with every field of every kind of resource.
const good = `apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata: {name: postgres}
spec:
  target: Host
  ports: [5432]
  access:
    - identities: ["spiffe://example.org/app/web", "spiffe://example.org/ops/*"]
---
apiVersion: sallyport.dev/v1alpha1
kind: ProtectedService
metadata:
  name: cache
spec:
  target: Pod
  protocol: TCP
  ports: [6379, 6380]
  addresses: ["10.2.0.2", "fd00:2::2"]
  device: veth1a2b
---
apiVersion: sallyport.dev/v1alpha1
kind: BypassPolicy
metadata: {name: nightly-backup}
spec:
  services: [postgres]
  bindings: [address]
  sources: ["10.1.0.2", "10.1.0.0/24", "fd00:1::/64"]
  nodeAddresses: false
  maxDuration: 15m
  signers: [alice]
  requireTicket: false
---
apiVersion: sallyport.dev/v1alpha1
kind: Keyring
metadata: {name: operators}
spec:
  people:
    - name: alice
      keys:
        - publicKey: "ed25519:O2onvM62pC1io6jQKm8Nc2UyFXcd4kOmOsBIoYtZ2ik="
          notAfter: 2027-01-01T00:00:00Z
`

func mustParse(t testing.TB, text string) *policy.Set {
	t.Helper()
	s, err := policy.Parse("resources.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestParseGood(t *testing.T) {
	s := mustParse(t, good)
	again := mustParse(t, string(s.YAML()))
	if string(again.YAML()) != string(s.YAML()) || again.Digest() != s.Digest() {
		t.Errorf("canonical form is not stable:\n%s\nbecomes\n%s", s.YAML(), again.YAML())
	}
	if len(s.Services()) != 2 || len(s.BypassPolicies()) != 1 || len(s.Keyrings()) != 1 {
		t.Errorf("lost resources:\n%s", s.YAML())
	}
	t.Logf("%s", s.YAML())
}
