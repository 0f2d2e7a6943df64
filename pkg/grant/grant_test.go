package grant_test

import (
	"encoding/json"
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// now is the clock of these tests.
var now = time.Date(2026, 11, 22, 3, 0, 0, 0, time.UTC)

func goodPayload() grant.Payload {
	return grant.Payload{
		ID: "01KAMXQ5T8W2J4N6R8V0Y2A4C6", Requester: "backup@example.org", Service: "postgres",
		Binding:   policy.BindingAddress,
		Addresses: []netip.Addr{netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("fd00:1::2")},
		Ports:     []uint16{5432}, NotBefore: now, NotAfter: now.Add(time.Hour), Duration: 15 * time.Minute, IdleTimeout: 5 * time.Minute,
		Budget: policy.Budget{Bytes: 10 << 30, Packets: 1e9, Connections: 5, ConnectionsPerSecond: 2}, Ingress: policy.IngressUplink,
		Reason: `nightly <backup> & "restore" ünïcode`, Ticket: "OPS-1", Audience: "node-1",
		PolicyDigest: strings.Repeat("0a", 32),
	}
}

// person makes a person with new keys.
func person(t testing.TB, name string, keys ...grant.PrivateKey) policy.Person {
	t.Helper()
	p := policy.Person{Name: name}
	for _, k := range keys {
		p.Keys = append(p.Keys, policy.Key{PublicKey: k.Public()})
	}
	return p
}

func keyring(people ...policy.Person) []policy.Keyring {
	return []policy.Keyring{{Spec: policy.KeyringSpec{People: people}}}
}

func newKey(t testing.TB) grant.PrivateKey {
	t.Helper()
	k, err := grant.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// checkError holds an error to its sentinel, to its field, and to what every error must have.
func checkError(t *testing.T, err, sentinel error, field string) {
	t.Helper()
	if !errors.Is(err, sentinel) {
		t.Errorf("got %v, want %v", err, sentinel)
	}
	for _, e := range policy.Errors(err) {
		if e.Hint == "" || e.Msg == "" || strings.ContainsAny(e.Error(), "\n\r\x1b") {
			t.Errorf("error lacks a hint, or is not one line: %+v", e)
		}
	}
	if e, ok := errors.AsType[*policy.Error](err); !ok || e.Field != field {
		t.Errorf("error names the field %+v, want %q", e, field)
	}
}

func TestNewID(t *testing.T) {
	seen := map[string]bool{}
	for range 1000 {
		id, err := grant.NewID(now)
		if err != nil || len(id) != 26 || seen[id] {
			t.Fatalf("got %q, %v", id, err)
		}
		seen[id] = true
	}
	if _, err := grant.NewID(time.Unix(-1, 0)); err == nil {
		t.Error("an id of a time before 1970")
	}
}

func TestUnmarshalJSONWrong(t *testing.T) {
	for _, text := range []string{`{"x":1}`, `{"duration":"soon"}`, `[]`, `{"ports":[0.5]}`} {
		p := goodPayload()
		if err := json.Unmarshal([]byte(text), &p); err == nil || p.ID != goodPayload().ID {
			t.Errorf("%s gives %+v, %v", text, p, err)
		}
	}
}

func TestCheckTime(t *testing.T) {
	p := goodPayload()
	for _, c := range []struct {
		at       time.Time
		sentinel error
		field    string
	}{
		{p.NotBefore.Add(-1), grant.ErrNotYet, "notBefore"},
		{p.NotBefore, nil, ""},
		{p.NotAfter.Add(-1), nil, ""},
		{p.NotAfter, grant.ErrExpired, "notAfter"},
		{p.NotAfter.Add(time.Hour), grant.ErrExpired, "notAfter"},
	} {
		err := p.CheckTime(c.at)
		if c.sentinel == nil {
			if err != nil {
				t.Errorf("%s: %v", c.at, err)
			}
			continue
		}
		checkError(t, err, c.sentinel, c.field)
	}
}

func TestCheckAudienceAndPolicy(t *testing.T) {
	p := goodPayload()
	if err := errors.Join(p.CheckAudience("node-1"), p.CheckPolicy(p.PolicyDigest)); err != nil {
		t.Error(err)
	}
	checkError(t, p.CheckAudience("node-2"), grant.ErrAudience, "audience")
	checkError(t, p.CheckAudience(""), grant.ErrAudience, "audience")
	checkError(t, p.CheckPolicy(strings.Repeat("0b", 32)), grant.ErrPolicyDigest, "policyDigest")
	checkError(t, p.CheckPolicy(""), grant.ErrPolicyDigest, "policyDigest")
	p.PolicyDigest = ""
	if err := p.CheckPolicy("anything"); err != nil {
		t.Error(err)
	}
}

func TestDeadline(t *testing.T) {
	p := goodPayload()
	for at, want := range map[time.Duration]time.Duration{
		0: 15 * time.Minute, 30 * time.Minute: 45 * time.Minute, 45 * time.Minute: time.Hour,
		50 * time.Minute: time.Hour, 2 * time.Hour: time.Hour,
	} {
		if got := p.Deadline(now.Add(at)); !got.Equal(now.Add(want)) {
			t.Errorf("activated after %s it ends at %s", at, got)
		}
	}
}

func TestValidate(t *testing.T) {
	if err := goodPayload().Validate(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		spoil func(*grant.Payload)
		field string
	}{
		{"no id", func(p *grant.Payload) { p.ID = "" }, "id"},
		{"id in small letters", func(p *grant.Payload) { p.ID = strings.ToLower(p.ID) }, "id"},
		{"id with other letters", func(p *grant.Payload) { p.ID = strings.Repeat("U", 26) }, "id"},
		{"id too large", func(p *grant.Payload) { p.ID = strings.Repeat("Z", 26) }, "id"},
		{"no requester", func(p *grant.Payload) { p.Requester = "" }, "requester"},
		{"requester with a newline", func(p *grant.Payload) { p.Requester = "a\nb" }, "requester"},
		{"no service", func(p *grant.Payload) { p.Service = "" }, "service"},
		{"bad service", func(p *grant.Payload) { p.Service = "Post gres" }, "service"},
		{"no binding", func(p *grant.Payload) { p.Binding = "" }, "binding"},
		{"unknown binding", func(p *grant.Payload) { p.Binding = "host" }, "binding"},
		{"port of an address", func(p *grant.Payload) { p.ClientPort = 1 }, "clientPort"},
		{"control group of an address", func(p *grant.Payload) { p.Cgroup = 1 }, "cgroup"},
		{"no address", func(p *grant.Payload) { p.Addresses = nil }, "addresses"},
		{"too many addresses", func(p *grant.Payload) { p.Addresses = make([]netip.Addr, 65) }, "addresses"},
		{"zero address", func(p *grant.Payload) { p.Addresses[1] = netip.Addr{} }, "addresses[1]"},
		{"v4-mapped address", func(p *grant.Payload) { p.Addresses[1] = netip.MustParseAddr("::ffff:10.1.0.2") }, "addresses[1]"},
		{"address with a zone", func(p *grant.Payload) { p.Addresses[1] = p.Addresses[1].WithZone("eth0") }, "addresses[1]"},
		{"unspecified address", func(p *grant.Payload) { p.Addresses[0] = netip.IPv4Unspecified() }, "addresses[0]"},
		{"address twice", func(p *grant.Payload) { p.Addresses[1] = p.Addresses[0] }, "addresses[1]"},
		{"port 0", func(p *grant.Payload) { p.Ports[0] = 0 }, "ports[0]"},
		{"port twice", func(p *grant.Payload) { p.Ports = []uint16{1, 1} }, "ports[1]"},
		{"too many ports", func(p *grant.Payload) { p.Ports = make([]uint16, 1025) }, "ports"},
		{"no begin", func(p *grant.Payload) { p.NotBefore = time.Time{} }, "notBefore"},
		{"no end", func(p *grant.Payload) { p.NotAfter = time.Time{} }, "notAfter"},
		{"end before begin", func(p *grant.Payload) { p.NotAfter = p.NotBefore.Add(-1) }, "notAfter"},
		{"end at begin", func(p *grant.Payload) { p.NotAfter = p.NotBefore }, "notAfter"},
		{"window too long", func(p *grant.Payload) { p.NotAfter = p.NotBefore.Add(grant.MaxWindow + 1) }, "notAfter"},
		{"year 10000", func(p *grant.Payload) {
			p.NotBefore, p.NotAfter = time.Date(9999, 12, 31, 23, 0, 0, 0, time.UTC), time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC)
		}, "notAfter"},
		{"unknown begin", func(p *grant.Payload) { p.Begin = "soon" }, "begin"},
		{"zero duration", func(p *grant.Payload) { p.Duration = 0 }, "duration"},
		{"negative duration", func(p *grant.Payload) { p.Duration = -time.Second }, "duration"},
		{"duration over the cap", func(p *grant.Payload) { p.Duration = 24*time.Hour + 1 }, "duration"},
		{"idle too short", func(p *grant.Payload) { p.IdleTimeout = time.Second }, "idleTimeout"},
		{"idle negative", func(p *grant.Payload) { p.IdleTimeout = -time.Minute }, "idleTimeout"},
		{"idle over the cap", func(p *grant.Payload) { p.IdleTimeout = 25 * time.Hour }, "idleTimeout"},
		{"bytes over the cap", func(p *grant.Payload) { p.Budget.Bytes = policy.MaxSize + 1 }, "budget"},
		{"packets over the cap", func(p *grant.Payload) { p.Budget.Packets = 1 << 63 }, "budget"},
		{"connections over the cap", func(p *grant.Payload) { p.Budget.Connections = 1 << 63 }, "budget"},
		{"unknown ingress", func(p *grant.Payload) { p.Ingress = "tunnel" }, "ingress"},
		{"empty reason", func(p *grant.Payload) { p.Reason = "" }, "reason"},
		{"blank reason", func(p *grant.Payload) { p.Reason = " \t " }, "reason"},
		{"long reason", func(p *grant.Payload) { p.Reason = strings.Repeat("x", 513) }, "reason"},
		{"reason with an escape", func(p *grant.Payload) { p.Reason = "a\x1b[2Jb" }, "reason"},
		{"reason written backwards", func(p *grant.Payload) { p.Reason = "a\u202eb" }, "reason"},
		{"reason not UTF-8", func(p *grant.Payload) { p.Reason = "a\xff" }, "reason"},
		{"blank ticket", func(p *grant.Payload) { p.Ticket = " " }, "ticket"},
		{"no audience", func(p *grant.Payload) { p.Audience = "" }, "audience"},
		{"bad audience", func(p *grant.Payload) { p.Audience = "node 1" }, "audience"},
		{"digest in capitals", func(p *grant.Payload) { p.PolicyDigest = strings.ToUpper(p.PolicyDigest) }, "policyDigest"},
		{"digest cut off", func(p *grant.Payload) { p.PolicyDigest = p.PolicyDigest[:62] }, "policyDigest"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := goodPayload()
			c.spoil(&p)
			err := p.Validate()
			checkError(t, err, grant.ErrInvalid, c.field)
			if _, signErr := grant.Sign(t.Context(), p, newKey(t)); signErr == nil || signErr.Error() != err.Error() {
				t.Errorf("Sign says %v", signErr)
			}
		})
	}
}

// TestBegin: what begins by its resource says so under its signatures, and whoever breaks the glass is there.
func TestBegin(t *testing.T) {
	p, key := goodPayload(), newKey(t)
	p.Begin = grant.BeginApplied
	envelope, err := grant.Sign(t.Context(), p, key)
	if err != nil {
		t.Fatal(err)
	}
	if v, err := grant.Verify(envelope, keyring(person(t, p.Requester, key)), now); err != nil || v.Payload.Begin != grant.BeginApplied {
		t.Errorf("%q, %v", v.Payload.Begin, err)
	}
	other := goodPayload()
	if a, _ := p.Digest(); a == "" {
		t.Error("no digest")
	} else if b, _ := other.Digest(); a == b {
		t.Error("who signed the one has signed the other")
	}
	p.Kind = grant.BreakGlass
	if err := p.Validate(); err == nil || !strings.Contains(err.Error(), "begin: a break-glass grant does not begin by a resource") {
		t.Errorf("break-glass: %v", err)
	}
}

// TestBindingsToSockets: what is bound to sockets names them, wholly, and is not signed.
func TestBindingsToSockets(t *testing.T) {
	tuple := func(p *grant.Payload) {
		p.Binding, p.ClientPort, p.Addresses, p.Ports = policy.BindingTuple, 40000, p.Addresses[:1], p.Ports[:1]
	}
	workload := func(p *grant.Payload) { p.Binding, p.Cgroup, p.Addresses = policy.BindingWorkload, 7, p.Addresses[:1] }
	for _, c := range []struct {
		name  string
		is    func(*grant.Payload)
		spoil func(*grant.Payload)
		field string
	}{
		{"tuple", tuple, func(*grant.Payload) {}, ""},
		{"tuple without its port", tuple, func(p *grant.Payload) { p.ClientPort = 0 }, "clientPort"},
		{"tuple to every port", tuple, func(p *grant.Payload) { p.Ports = nil }, "ports"},
		{"tuple of a control group", tuple, func(p *grant.Payload) { p.Cgroup = 7 }, "cgroup"},
		{"tuple of two clients", tuple, func(p *grant.Payload) { p.Addresses = goodPayload().Addresses }, "addresses"},
		{"workload", workload, func(*grant.Payload) {}, ""},
		{"workload without its group", workload, func(p *grant.Payload) { p.Cgroup = 0 }, "cgroup"},
		{"workload with a port", workload, func(p *grant.Payload) { p.ClientPort = 1 }, "clientPort"},
		{"workload that begins by its resource", workload, func(p *grant.Payload) { p.Begin = grant.BeginApplied }, "begin"},
		{"workload of two addresses", workload, func(p *grant.Payload) { p.Addresses = goodPayload().Addresses }, "addresses"},
	} {
		p := goodPayload()
		c.is(&p)
		c.spoil(&p)
		err := p.Validate()
		if c.field != "" {
			checkError(t, err, grant.ErrInvalid, c.field)
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		_, err = grant.Sign(t.Context(), p, newKey(t))
		checkError(t, err, grant.ErrInvalid, "binding")
		var again grant.Payload
		body, err := json.Marshal(p)
		if err == nil {
			err = json.Unmarshal(body, &again)
		}
		if err != nil || !reflect.DeepEqual(again, p) {
			t.Errorf("%s: read back %+v, %v", c.name, again, err)
		}
	}
	p := goodPayload()
	p.Device = 7 // that of the pod that asked: nobody who signs asks from one
	_, err := grant.Sign(t.Context(), p, newKey(t))
	checkError(t, err, grant.ErrInvalid, "device")
	forge := newForger(t)
	_, err = grant.Verify(forge.envelope(mustJSON(t, p)), forge.keyring(), now)
	checkError(t, err, grant.ErrInvalid, "device")
}

func TestValidateGivesAllErrors(t *testing.T) {
	var fields []string
	for _, e := range policy.Errors(grant.Payload{}.Validate()) {
		fields = append(fields, e.Field)
	}
	want := []string{"id", "requester", "service", "binding", "addresses", "notBefore", "notAfter", "duration", "reason", "audience"}
	for _, w := range want {
		if !slices.Contains(fields, w) {
			t.Errorf("no error about %s in %v", w, fields)
		}
	}
}

// TestBreakGlassIsNarrow: what an ordinary grant may be, one for break-glass need not.
func TestBreakGlassIsNarrow(t *testing.T) {
	narrow := func(p *grant.Payload) {
		p.Duration, p.NotAfter, p.Addresses = time.Hour, p.NotBefore.Add(24*time.Hour), p.Addresses[:1]
	}
	for field, change := range map[string]func(*grant.Payload){
		"":         func(*grant.Payload) {},
		"kind":     func(p *grant.Payload) { p.Kind = "more" },
		"duration": func(p *grant.Payload) { p.Duration++ },
		"notAfter": func(p *grant.Payload) { p.NotAfter = p.NotAfter.Add(1) },
		"addresses": func(p *grant.Payload) {
			p.Addresses = nil
			for i := range 5 {
				p.Addresses = append(p.Addresses, netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)}))
			}
		},
	} {
		p := goodPayload()
		narrow(&p)
		id, err := grant.NewID(p.NotBefore)
		if err != nil {
			t.Fatal(err)
		}
		p.ID, p.Kind = id, grant.BreakGlass
		change(&p)
		if e := policy.Errors(p.Validate()); len(e) > 1 || len(e) == 0 && field != "" || len(e) == 1 && e[0].Field != field {
			t.Errorf("%q: %v", field, p.Validate())
		}
		if p.Kind = ""; p.Validate() != nil {
			t.Errorf("%q: an ordinary grant: %v", field, p.Validate())
		}
	}
	p := goodPayload() // made long before
	narrow(&p)
	p.Kind = grant.BreakGlass
	if e := policy.Errors(p.Validate()); len(e) != 1 || e[0].Field != "notAfter" {
		t.Errorf("kept for later: %v", p.Validate())
	}
}
