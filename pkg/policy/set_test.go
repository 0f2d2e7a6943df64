package policy_test

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// generator makes random valid resources.
type generator struct {
	*rand.Rand
	port uint16
}

func (g *generator) name(kind string, i int) string {
	// Names that YAML could take for something else are in.
	odd := []string{"true", "null", "1e3", "0x1f", "yes", "1-2", "on", "12", "no"}
	if i < len(odd) && g.IntN(2) == 0 {
		return odd[i]
	}
	return fmt.Sprintf("%s-%d", kind, i)
}

func (g *generator) service(i int) policy.ProtectedService {
	s := policy.ProtectedService{Metadata: policy.Metadata{Name: g.name("service", i)}}
	s.Spec.Mode = pick(g.Rand, policy.ModeEnforce, policy.ModeShadow, policy.ModeObserve)
	s.APIVersion, s.Kind = policy.APIVersion, policy.KindProtectedService
	s.Spec.Target, s.Spec.Protocol = policy.TargetHost, policy.ProtocolTCP
	for range 1 + g.IntN(3) {
		g.port++
		s.Spec.Ports = append(s.Spec.Ports, g.port)
	}
	if g.IntN(2) == 0 {
		s.Spec.Target = policy.TargetPod
		s.Spec.Addresses = []netip.Addr{g.addr(), g.addr()}
		s.Spec.Device = pick(g.Rand, "", "veth#1", "-", "123", "eth0.5", "@%!'\"")
	}
	if s.Spec.UDP = pick(g.Rand, "", policy.UDPDeny, policy.UDPAllow); g.IntN(4) == 0 {
		s.Spec.Protocol, s.Spec.UDP = policy.ProtocolUDP, ""
		s.Spec.Idle = &policy.Duration{Duration: time.Duration(1+g.IntN(3600)) * time.Second}
		return s
	}
	for range g.IntN(3) {
		s.Spec.Access = append(s.Spec.Access, policy.AccessRule{Identities: []string{
			fmt.Sprintf("spiffe://td%d.org/a/b-%d", g.IntN(2), g.IntN(9)), "spiffe://td.org/x/*",
		}})
	}
	return s
}

func (g *generator) addr() netip.Addr {
	if g.IntN(2) == 0 {
		return netip.AddrFrom4([4]byte{10, byte(g.IntN(256)), byte(g.IntN(256)), byte(g.IntN(256))})
	}
	a := [16]byte{0xfd}
	for i := 8; i < 16; i++ {
		a[i] = byte(g.IntN(256))
	}
	return netip.AddrFrom16(a)
}

func (g *generator) bypass(i int, services []string, people []string) policy.BypassPolicy {
	p := policy.BypassPolicy{Metadata: policy.Metadata{Name: g.name("bypass", i)}}
	p.APIVersion, p.Kind = policy.APIVersion, policy.KindBypassPolicy
	addr := g.addr()
	network, _ := g.addr().Prefix(8 + g.IntN(16))
	p.Spec = policy.BypassPolicySpec{
		Services: []string{pick(g.Rand, services...)}, Bindings: []string{policy.BindingAddress},
		Sources:       []policy.AddressRange{{Prefix: netip.PrefixFrom(addr, addr.BitLen())}, {Prefix: network}},
		NodeAddresses: g.IntN(2) == 0, Ticket: policy.TicketRule{Required: g.IntN(2) == 0, Pattern: pick(g.Rand, "", "OPS-[0-9]+")},
		MaxDuration: policy.Duration{Duration: 1 + time.Duration(g.Int64N(int64(24*time.Hour)))},
		Requesters:  []string{pick(g.Rand, people...)},
	}
	if g.IntN(2) == 0 {
		p.Spec.Approvals = []policy.Approval{{From: []string{pick(g.Rand, people...)}, Min: uint8(1 + g.IntN(3))}}
	}
	return p
}

func (g *generator) keyring(i int, person string) policy.Keyring {
	k := policy.Keyring{Metadata: policy.Metadata{Name: g.name("keyring", i)}}
	k.APIVersion, k.Kind = policy.APIVersion, policy.KindKeyring
	p := policy.Person{Name: person}
	for range 1 + g.IntN(2) {
		seed := make([]byte, ed25519.SeedSize)
		for i := range seed {
			seed[i] = byte(g.IntN(256))
		}
		public, err := policy.NewPublicKey(ed25519.NewKeyFromSeed(seed).Public().(ed25519.PublicKey))
		if err != nil {
			panic(err)
		}
		key := policy.Key{PublicKey: public}
		if g.IntN(2) == 0 {
			key.NotAfter = time.Unix(g.Int64N(1<<33), g.Int64N(1e9)).UTC()
		}
		p.Keys = append(p.Keys, key)
	}
	k.Spec.Version, k.Spec.People = 1+g.Uint64N(9), []policy.Person{p}
	if g.IntN(2) == 0 {
		k.Spec.Groups = []policy.Group{{Name: g.name("group", i), Members: []string{person}}}
		k.Spec.RevokedKeys = []string{p.Keys[0].PublicKey.ID()}
	}
	return k
}

// resources makes a valid set as it would be written by a program.
func (g *generator) resources() []any {
	var out []any
	var services, people []string
	for i := range 1 + g.IntN(6) {
		s := g.service(i)
		services = append(services, s.Name)
		out = append(out, s)
	}
	for i := range 1 + g.IntN(3) {
		people = append(people, pick(g.Rand, "p", "0", "A.b")+fmt.Sprint(i))
		out = append(out, g.keyring(i, people[i]))
	}
	for i := range g.IntN(4) {
		out = append(out, g.bypass(i, services, people))
	}
	g.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out
}

func TestRoundTripOfRandomSets(t *testing.T) {
	g := &generator{Rand: rand.New(rand.NewPCG(9, 10))}
	for range 100 {
		g.port = 0
		resources := g.resources()
		var text bytes.Buffer
		enc := yaml.NewEncoder(&text)
		for _, r := range resources {
			if err := enc.Encode(r); err != nil {
				t.Fatal(err)
			}
		}
		s, err := policy.Parse("random.yaml", text.Bytes())
		if err != nil {
			t.Fatalf("%v\n%s", err, text.Bytes())
		}
		checkRoundTrip(t, s)
		checkHolds(t, s, resources)
	}
}

// checkRoundTrip holds a set against what its canonical form gives.
func checkRoundTrip(t *testing.T, s *policy.Set) {
	t.Helper()
	again, err := policy.Parse("canonical.yaml", s.YAML())
	if err != nil {
		t.Fatalf("canonical form does not parse: %v\n%s", err, s.YAML())
	}
	if !bytes.Equal(again.YAML(), s.YAML()) || again.Digest() != s.Digest() {
		t.Fatalf("canonical form is not stable:\n%s\nbecomes\n%s", s.YAML(), again.YAML())
	}
	if !reflect.DeepEqual(flat(s), flat(again)) {
		t.Fatalf("set comes back as another:\n%+v\n%+v", flat(s), flat(again))
	}
}

// checkHolds looks for every resource in the set.
func checkHolds(t *testing.T, s *policy.Set, want []any) {
	t.Helper()
	got := flat(s)
	for _, w := range want {
		found := false
		for _, r := range got {
			found = found || reflect.DeepEqual(r, w)
		}
		if !found {
			t.Fatalf("lost %+v in\n%s", w, s.YAML())
		}
	}
	if len(got) != len(want) {
		t.Fatalf("%d resources became %d", len(want), len(got))
	}
}

// flat lists all resources without where they were read.
func flat(s *policy.Set) []any {
	var out []any
	for _, r := range s.Services() {
		r.Source = policy.Source{}
		out = append(out, r)
	}
	for _, r := range s.BypassPolicies() {
		r.Source = policy.Source{}
		out = append(out, r)
	}
	for _, r := range s.Keyrings() {
		r.Source = policy.Source{}
		out = append(out, r)
	}
	return out
}

func TestSetIsInOrderAndOfOneForm(t *testing.T) {
	docs := strings.Split(good, "---\n")
	reversed := docs[3] + "---\n" + docs[2] + "---\n" + docs[1] + "---\n" + docs[0]
	if mustParse(t, reversed).Digest() != mustParse(t, good).Digest() {
		t.Error("the order of documents changes the digest")
	}
	if len(mustParse(t, good).Digest()) != 64 {
		t.Error("the digest is no SHA-256 in hex")
	}
	changed := strings.Replace(good, "15m", "16m", 1)
	if mustParse(t, changed).Digest() == mustParse(t, good).Digest() {
		t.Error("a change does not change the digest")
	}
}

func TestSetDoesNotChange(t *testing.T) {
	s := mustParse(t, good)
	s.Services()[0].Name = "changed"
	s.YAML()[0] = '!'
	if _, ok := s.Service("cache"); !ok || s.Services()[0].Name != "cache" {
		t.Error("the list of services is shared")
	}
	checkRoundTrip(t, s)
}

// TestJSONHasTheShapeOfTheYAML holds the two tags of each field together.
func TestJSONHasTheShapeOfTheYAML(t *testing.T) {
	for _, r := range flat(mustParse(t, needTicket(allowNode(good)))) {
		asJSON, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		asYAML, err := yaml.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		var fromJSON, fromYAML any
		if err := json.Unmarshal(asJSON, &fromJSON); err != nil {
			t.Fatal(err)
		}
		if err := yaml.Unmarshal(asYAML, &fromYAML); err != nil {
			t.Fatal(err)
		}
		again, err := json.Marshal(fromYAML)
		if err != nil {
			t.Fatal(err)
		}
		var normal any
		if err := json.Unmarshal(again, &normal); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(fromJSON, normal) {
			t.Errorf("JSON\n%s\nYAML\n%s", asJSON, again)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(good))
	f.Add([]byte(good + widePolicy))
	f.Add([]byte(goodConfig))
	f.Add([]byte(web))
	for _, w := range wrongWebs {
		f.Add([]byte(strings.Replace(web, w.old, w.new, 1)))
	}
	for _, w := range wrongs {
		f.Add([]byte(strings.Replace(good, w.old, w.new, 1)))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := policy.ParseAgentConfig("agent.yaml", data); err != nil {
			checkErrors(t, err)
		}
		s, err := policy.Parse("fuzz.yaml", data)
		if err != nil {
			if s != nil {
				t.Fatal("a set came with the error")
			}
			checkErrors(t, err)
			return
		}
		if len(s.Services()) == 0 {
			t.Fatal("an empty set is valid")
		}
		checkRoundTrip(t, s)
	})
}

// checkErrors holds errors to being one line each, with their file.
func checkErrors(t *testing.T, err error) {
	t.Helper()
	for _, e := range policy.Errors(err) {
		if e.Msg == "" || strings.ContainsAny(e.Error(), "\n\r\x1b") {
			t.Fatalf("bad error %q", e.Error())
		}
		if e.File == "" && !strings.Contains(e.Msg, "more problems") {
			t.Fatalf("error without a file: %q", e.Error())
		}
		if e.Hint == "" {
			t.Fatalf("error without a next step: %q", e.Error())
		}
	}
}

func BenchmarkParse10000Services(b *testing.B) {
	g := &generator{Rand: rand.New(rand.NewPCG(11, 12))}
	var text bytes.Buffer
	enc := yaml.NewEncoder(&text)
	for i := range 10000 {
		if err := enc.Encode(g.service(100 + i)); err != nil {
			b.Fatal(err)
		}
	}
	b.SetBytes(int64(text.Len()))
	for b.Loop() {
		if _, err := policy.Parse("b.yaml", text.Bytes()); err != nil {
			b.Fatal(err)
		}
	}
}
