package proxy

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

func writePolicy(t *testing.T, path, service string) {
	t.Helper()
	text := fmt.Sprintf("apiVersion: sallyport.dev/v1alpha1\nkind: ProtectedService\nmetadata: {name: %s}\n"+
		"spec: {target: Host, ports: [5432], access: [{identities: [\"spiffe://example.org/a\"]}]}\n", service)
	replace(t, path, text)
}

func replace(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func holds(f *PolicyFile, service string) bool {
	s := f.Set().Services()
	return len(s) == 1 && s[0].Name == service
}

func awaitPolicy(t *testing.T, f *PolicyFile, service string) {
	t.Helper()
	deadline := time.After(3 * resync)
	for {
		changed := f.Changed()
		if holds(f, service) {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("%s does not come into force", service)
		}
	}
}

// TestSignalsFile: what was said counts at once, a bad file changes nothing, and one that is gone takes nothing back.
func TestSignalsFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path, said := filepath.Join(dir, "policy.yaml"), filepath.Join(dir, policy.SignalsFile)
	replace(t, path, "apiVersion: sallyport.dev/v1alpha1\nkind: ProtectedService\nmetadata: {name: a}\n"+
		"spec: {target: Host, ports: [5432], access: [{identities: [\"spiffe://example.org/a\"], signals: [{source: edr}]}]}\n")
	f := NewPolicyFile(path, slog.New(slog.DiscardHandler))
	follow(t, f)
	who := policy.Caller{ID: spiffeid.RequireFromString("spiffe://example.org/a")}
	await := func(want bool) {
		t.Helper()
		deadline := time.After(3 * resync)
		for {
			changed := f.Changed()
			if f.Set().Authorise("a", who, nil, time.Now()).Allowed == want {
				return
			}
			select {
			case <-changed:
			case <-deadline:
				t.Fatalf("allowed does not become %t", want)
			}
		}
	}
	write := func(all ...policy.Said) {
		t.Helper()
		data, err := policy.WriteSignals(all)
		if err != nil {
			t.Fatal(err)
		}
		replace(t, said, string(data))
	}
	until := time.Now().Add(time.Hour)
	await(true)
	write(policy.Said{Source: "edr", Against: true, Until: until})
	await(false)
	write()
	await(true)
	write(policy.Said{Source: "edr", Against: true, Until: until})
	await(false)
	g := NewPolicyFile(path, slog.New(slog.DiscardHandler)) // which only reads when it is told to
	replace(t, said, "{")
	if g.read(); g.Set().Authorise("a", who, nil, time.Now()).Allowed {
		t.Error("a file that cannot be read takes back what was said")
	}
	if err := os.Remove(said); err != nil {
		t.Fatal(err)
	}
	if g.read(); g.Set().Authorise("a", who, nil, time.Now()).Allowed {
		t.Error("a file that is gone takes back what was said")
	}
	writePolicy(t, path, "b")
	awaitPolicy(t, f, "b")
}

func follow(t *testing.T, f *PolicyFile) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestPolicyFileFollowsRenames(t *testing.T) {
	path := filepath.Join(t.TempDir(), "policy.yaml")
	f := NewPolicyFile(path, slog.New(slog.DiscardHandler))
	if f.Set() != nil {
		t.Fatal("policy out of nothing")
	}
	follow(t, f)
	for _, service := range []string{"one", "two", "three"} {
		writePolicy(t, path, service)
		awaitPolicy(t, f, service)
	}
}

func TestPolicyFileKeepsTheLastGoodOne(t *testing.T) {
	path := filepath.Join(t.TempDir(), "policy.yaml")
	writePolicy(t, path, "good")
	f := NewPolicyFile(path, slog.New(slog.DiscardHandler))
	for _, bad := range []string{"", "kind: Nonsense\n", "\x00"} {
		replace(t, path, bad)
		f.read()
		if !holds(f, "good") {
			t.Errorf("%q changed the policy", bad)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	f.read()
	if !holds(f, "good") {
		t.Error("a removed file changed the policy")
	}
	writePolicy(t, path, "better")
	f.read()
	if !holds(f, "better") {
		t.Error("does not recover")
	}
}

// A service manager may remove the agent's folder with it and make another.
func TestPolicyFileOutlivesItsFolder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "policy.yaml")
	f := NewPolicyFile(path, slog.New(slog.DiscardHandler))
	follow(t, f)
	for _, service := range []string{"one", "two"} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		writePolicy(t, path, service)
		awaitPolicy(t, f, service)
		if err := os.RemoveAll(filepath.Dir(path)); err != nil {
			t.Fatal(err)
		}
	}
	if !holds(f, "two") {
		t.Error("policy went with its folder")
	}
}
