//go:build k8s

package agent

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/kube"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/store"
	"github.com/sallyport-dev/sallyport/test/apiserver"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// clustered is a node whose resources come from a real API server.
type clustered struct {
	*installed
	server  *apiserver.Server
	officer signer // of the node's configuration
	running *lab.Process
}

// agentsRights are all that the agent needs of the API server.
const agentsRights = `apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: sallyport-agent}
rules:
  - {apiGroups: [sallyport.dev], resources: [protectedservices, bypasspolicies, keyrings, denylists, granttemplates, resourcesets, identityproviders, remoteservices, bypassgrants], verbs: [list, watch]}
  - {apiGroups: [sallyport.dev], resources: [protectedservices/status, bypasspolicies/status, keyrings/status, denylists/status, granttemplates/status, resourcesets/status, identityproviders/status, remoteservices/status, bypassgrants/status], verbs: [patch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: sallyport-agent}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: sallyport-agent}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: agent}]
`

func installClustered(t *testing.T) *clustered {
	t.Helper()
	c := &clustered{installed: install(t), officer: newSigner(t)}
	c.server = apiserver.Start(t, c.lab.Node, filepath.Join(c.lab.Dir, "apiserver"))
	c.server.Kubectl("", "apply", "-f", filepath.Join("..", "..", "deploy", "crds"))
	c.server.Kubectl("", "wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
	c.server.Kubectl(agentsRights, "apply", "-f", "-")
	config, err := os.ReadFile(c.config)
	must(t, err)
	must(t, os.WriteFile(c.config, fmt.Appendf(config, "  kubernetes: {kubeconfig: %q}\n  policySet: all\n  policyKeys: [%q]\n",
		c.server.Kubeconfig(apiserver.Agent), c.officer.key.Public()), 0o600))
	c.cfg, err = loadConfig(c.config)
	must(t, err)
	return c
}

// set is the resources of alice with a version.
func (c *clustered) set(maxDuration string, version int) string {
	return c.signer.resources(maxDuration) + fmt.Sprintf("---\napiVersion: sallyport.dev/v1alpha1\nkind: ResourceSet\nmetadata: {name: all}\nspec: {version: %d}\n", version)
}

// signed is the set with the officer's signature, as it is applied.
func (c *clustered) signed(set string) string {
	c.t.Helper()
	parsed, err := policy.Parse("set", []byte(set))
	must(c.t, err)
	envelope, err := grant.SignResources(c.t.Context(), parsed, nil, c.officer.key)
	must(c.t, err)
	return strings.Replace(set, "metadata: {name: all}", fmt.Sprintf("metadata: {name: all, annotations: {%s: %q}}", kube.Signatures, envelope), 1)
}

func (c *clustered) apply(what string) {
	c.t.Helper()
	c.server.Kubectl(what, "apply", "-f", "-")
}

// inForce is the longest duration of a grant by the set in force, of the proxy's file.
func (c *clustered) inForce() string {
	data, err := os.ReadFile(c.cfg.PolicyFile())
	if err != nil {
		return err.Error()
	}
	set, err := policy.Parse(c.cfg.PolicyFile(), data)
	must(c.t, err)
	return fmt.Sprintf("%s v%d", set.BypassPolicies()[0].Spec.MaxDuration, set.Version())
}

func (c *clustered) becomes(want string) {
	c.t.Helper()
	c.within(time.Minute, "in force: "+want, func() bool { return c.inForce() == want })
}

func (c *clustered) within(patience time.Duration, what string, ok func() bool) {
	c.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(patience); !ok(); {
		select {
		case <-tick.C:
		case <-deadline:
			c.t.Fatalf("not in time: %s (in force: %s)\n%v\n%s", what, c.inForce(), c.status().GetProblems(), c.running.Output())
		}
	}
}

func (c *clustered) problem(words ...string) {
	c.t.Helper()
	c.within(time.Minute, strings.Join(words, ", "), func() bool { return contains(strings.Join(c.status().GetProblems(), "\n"), words...) })
}

// follows tells whether nothing is wrong with the resources, or with the way to them.
func (c *clustered) follows() bool {
	return !slices.ContainsFunc(c.status().GetProblems(), func(line string) bool {
		return strings.HasPrefix(line, "resources") || strings.HasPrefix(line, "cluster")
	})
}

// resource carries an envelope.
func resource(name string, envelope []byte) string {
	text, _ := json.Marshal(string(envelope))
	return fmt.Sprintf("apiVersion: sallyport.dev/v1alpha1\nkind: BypassGrant\nmetadata: {name: %s}\nspec: {node: %s, envelope: %s}\n", name, testNode, text)
}

func (c *clustered) grant(id string) *api.Grant {
	reply, err := c.agent().Grants(c.t.Context(), &api.GrantsRequest{})
	must(c.t, err)
	for _, g := range reply.GetGrants() {
		if g.GetId() == id {
			return g
		}
	}
	return nil
}

func onApply(p *grant.Payload) { p.NotBefore, p.Begin = time.Now().UTC(), grant.BeginApplied }

// TestCluster is a node's life with a real API server.
func TestCluster(t *testing.T) {
	c := installClustered(t)
	c.apply(c.signed(c.set("15m", 1)))
	c.running = c.ready("run")
	c.becomes("15m v1")
	for _, step := range []struct {
		name string
		do   func(*clustered)
	}{
		{"resources", (*clustered).testResources}, {"weakening", (*clustered).testWeakening}, {"wrong", (*clustered).testWrong},
		{"grant", (*clustered).testGrant}, {"forged", (*clustered).testForged}, {"gone", (*clustered).testGone},
	} {
		if !t.Run(step.name, func(t *testing.T) { c.t, c.installed.t = t, t; step.do(c) }) {
			break
		}
	}
	c.t, c.installed.t = t, t
	must(t, c.running.Stop(10*time.Second))
	c.uninstall()
}

// testResources: what is tighter counts unsigned, at once.
func (c *clustered) testResources() {
	c.apply(c.set("10m", 1)) // takes the annotation off, too
	c.becomes("10m v1")
}

// testWeakening is invariant 15: whoever writes the API and has no key loosens nothing.
func (c *clustered) testWeakening() {
	c.apply(c.set("12m", 2))
	c.problem("ResourceSet/all", "10m became 12m", "not signed")
	c.server.Eventually([]string{"NotSigned", testNode + ": "}, "get", "resourceset", "all", "-o", "yaml")
	c.server.Kubectl("", "delete", "protectedservice", "postgres")
	c.problem("ProtectedService")
	if got := c.inForce(); got != "10m v1" || c.status().GetServices() != 1 {
		c.t.Errorf("in force: %s, %d services", got, c.status().GetServices())
	}
	// The version comes first, and what it is the version of after it.
	signed := c.signed(c.set("12m", 2))
	parts := strings.Split(signed, "---\n")
	c.apply(parts[3])
	c.apply(strings.Join(parts[:3], "---\n"))
	c.becomes("12m v2")
	c.server.Eventually([]string{`"True"`}, "get", "resourceset", "all", "-o", "yaml")
}

// testWrong: one wrong resource keeps the set in force, and is told which it is.
func (c *clustered) testWrong() {
	wrong := strings.Replace(strings.Split(c.set("11m", 2), "---\n")[1], "services: [postgres]", "services: [mysql]", 1)
	c.apply(wrong)
	c.problem("kubernetes: BypassPolicy/backup: spec.services[0]")
	c.server.Eventually([]string{"Invalid", "spec.services[0]", testNode + ": ", "observedGeneration"}, "get", "bypasspolicy", "backup", "-o", "yaml")
	if got := c.inForce(); got != "12m v2" {
		c.t.Errorf("in force: %s", got)
	}
	c.apply(c.signed(c.set("12m", 2)))
	c.within(time.Minute, "no problem is left", c.follows)
	c.server.Eventually([]string{`status: "True"`}, "get", "bypasspolicy", "backup", "-o", "yaml")
}

// testGrant: apply opens, delete ends, and it does not open again.
func (c *clustered) testGrant() {
	envelope := c.signer.envelope(c.t, onApply)
	id := idOf(c.t, envelope)
	c.apply(resource("backup", envelope))
	applied := time.Now()
	c.within(time.Minute, "open", func() bool { return c.grant(id).GetState() == store.StateActive })
	c.t.Logf("open %s after kubectl apply returned", time.Since(applied).Round(time.Millisecond))
	c.server.Eventually([]string{"type: Active", "reason: Open", "id: " + id, "requester: alice"}, "get", "bypassgrant", "backup", "-o", "yaml")
	c.server.Kubectl("", "delete", "bypassgrant", "backup")
	deleted := time.Now()
	c.within(time.Minute, "ended", func() bool { return c.grant(id).GetState() == store.StateRevoked })
	c.t.Logf("ended %s after kubectl delete returned", time.Since(deleted).Round(time.Millisecond))
	if g := c.grant(id); !strings.Contains(g.GetEndedWhy(), "deleted") {
		c.t.Errorf("ended: %s", g.GetEndedWhy())
	}
	c.apply(resource("backup", envelope))
	c.server.Eventually([]string{"type: Ended", "reason: Revoked"}, "get", "bypassgrant", "backup", "-o", "yaml")
	if got := c.grant(id).GetState(); got != store.StateRevoked {
		c.t.Errorf("applied again: %s", got)
	}
}

func idOf(t *testing.T, envelope []byte) string {
	t.Helper()
	p, err := grant.Peek(envelope)
	must(t, err)
	return p.ID
}

// testForged: the API server can say what it likes.
func (c *clustered) testForged() {
	stranger := newSigner(c.t)
	tampered := func(e []byte) []byte { // says another duration than was signed
		var env struct{ Payload string }
		must(c.t, json.Unmarshal(e, &env))
		body, err := base64.StdEncoding.DecodeString(env.Payload)
		must(c.t, err)
		other := base64.StdEncoding.EncodeToString([]byte(strings.Replace(string(body), `"1m"`, `"9m"`, 1)))
		return []byte(strings.Replace(string(e), env.Payload, other, 1))
	}
	for name, f := range map[string]struct {
		envelope []byte
		reason   string
	}{
		"stranger": {stranger.envelope(c.t, onApply), "UnknownKey"},
		"tampered": {tampered(c.signer.envelope(c.t, onApply)), "BadSignature"},
		"answered": {c.signer.envelope(c.t, nil), "BeginsOtherwise"},
		"another":  {c.signer.envelope(c.t, func(p *grant.Payload) { onApply(p); p.Audience = "node-2" }), "OtherNode"},
		"toolong":  {c.signer.envelope(c.t, func(p *grant.Payload) { onApply(p); p.Duration = 20 * time.Minute }), "PolicyRefuses"},
		"old": {c.signer.envelope(c.t, func(p *grant.Payload) {
			onApply(p)
			p.NotBefore = time.Now().Add(-time.Hour).UTC()
		}), "MaybeUsed"},
	} {
		c.apply(resource(name, f.envelope))
		out := c.server.Eventually([]string{"reason: "}, "get", "bypassgrant", name, "-o", "yaml")
		if !strings.Contains(out, "reason: "+f.reason) {
			c.t.Errorf("%s: %s", name, out)
		}
		if g := c.grant(idOf(c.t, f.envelope)); g != nil {
			c.t.Errorf("%s: %v", name, g)
		}
	}
}

// testGone: without the API server the node goes on, its paths end on time, and a new start has the last verified set.
func (c *clustered) testGone() {
	envelope := c.signer.envelope(c.t, func(p *grant.Payload) { onApply(p); p.Duration = 15 * time.Second })
	id := idOf(c.t, envelope)
	c.apply(resource("short", envelope))
	c.within(time.Minute, "open", func() bool { return c.grant(id).GetState() == store.StateActive })
	c.server.End()
	must(c.t, c.running.Kill())
	c.running = c.ready("run")
	if got := c.inForce(); got != "12m v2" || c.status().GetServices() != 1 {
		c.t.Errorf("started without the API server: %s, %d services", got, c.status().GetServices())
	}
	c.within(time.Minute, "ended on time", func() bool { return c.grant(id).GetState() == stateExpired })
	c.problem("cluster", "connection refused")
	c.damaged()
	c.server.Begin()
	c.within(2*time.Minute, "no problem is left", c.follows)
	c.apply(c.set("9m", 2))
	c.becomes("9m v2")
	c.server.Eventually([]string{"type: Ended", "reason: Expired"}, "get", "bypassgrant", "short", "-o", "yaml")
}

// damaged: a node does not begin anew with less than was signed, nor with what is not what it wrote.
func (c *clustered) damaged() {
	must(c.t, c.running.Stop(10*time.Second))
	file := verifiedFile(c.cfg)
	good, err := os.ReadFile(file)
	must(c.t, err)
	must(c.t, os.WriteFile(file, []byte(strings.Replace(string(good), "12m", "14m", 1)), 0o600))
	p := c.start("run")
	if err := p.Wait(c.t.Context()); err == nil || !contains(p.Output(), file, "is damaged", "hint: ") {
		c.t.Errorf("%v\n%s", err, p.Output())
	}
	must(c.t, os.WriteFile(file, good, 0o600))
	c.running = c.ready("run")
}
