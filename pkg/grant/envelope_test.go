package grant_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// forger signs any bytes as a payload, with a known key: what a broken or hostile signer could do.
type forger struct {
	private ed25519.PrivateKey
	public  policy.PublicKey
}

func newForger(t testing.TB) forger {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	key, err := policy.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	return forger{private, key}
}

func (f forger) keyring() []policy.Keyring {
	return keyring(policy.Person{Name: "mallory", Keys: []policy.Key{{PublicKey: f.public}}})
}

func (f forger) signature(payload []byte) dsse.Signature {
	sig := ed25519.Sign(f.private, dsse.PAE(grant.PayloadType, payload))
	return dsse.Signature{KeyID: f.public.ID(), Sig: base64.StdEncoding.EncodeToString(sig)}
}

func (f forger) envelope(payload []byte) []byte {
	return marshal(dsse.Envelope{
		PayloadType: grant.PayloadType, Payload: base64.StdEncoding.EncodeToString(payload),
		Signatures: []dsse.Signature{f.signature(payload)},
	})
}

func marshal(e dsse.Envelope) []byte {
	raw, err := json.Marshal(e)
	if err != nil {
		panic(err)
	}
	return raw
}

func TestSignAndVerify(t *testing.T) {
	k := newKey(t)
	envelope, err := grant.Sign(t.Context(), goodPayload(), k)
	if err != nil {
		t.Fatal(err)
	}
	v, err := grant.Verify(envelope, keyring(person(t, "bob", newKey(t)), person(t, "alice", k)), now)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(v.Payload, goodPayload()) {
		t.Errorf("payload comes back as\n%+v, want\n%+v", v.Payload, goodPayload())
	}
	if want := []policy.Signer{{Person: "alice", KeyID: k.Public().ID()}}; !reflect.DeepEqual(v.Signers, want) {
		t.Errorf("signers are %+v", v.Signers)
	}
	if p, err := grant.Peek(envelope); err != nil || !reflect.DeepEqual(p, v.Payload) {
		t.Errorf("Peek gives %+v, %v", p, err)
	}
}

// TestEnvelopeIsDSSE holds our envelopes against the library's verifier.
func TestEnvelopeIsDSSE(t *testing.T) {
	k := newKey(t)
	envelope, err := grant.Sign(t.Context(), goodPayload(), k)
	if err != nil {
		t.Fatal(err)
	}
	var env dsse.Envelope
	if err := json.Unmarshal(envelope, &env); err != nil {
		t.Fatal(err)
	}
	verifier, err := dsse.NewEnvelopeVerifier(dsseKey{k.Public()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := verifier.Verify(t.Context(), &env); err != nil {
		t.Error(err)
	}
	body, err := env.DecodeB64Payload()
	if err != nil {
		t.Fatal(err)
	}
	want := `{"id":"01KAMXQ5T8W2J4N6R8V0Y2A4C6","requester":"backup@example.org","service":"postgres",` +
		`"binding":"address","addresses":["10.1.0.2","fd00:1::2"],"ports":[5432],` +
		`"notBefore":"2026-11-22T03:00:00Z","notAfter":"2026-11-22T04:00:00Z","duration":"15m","idleTimeout":"5m",` +
		`"budget":{"bytes":10737418240,"packets":1000000000,"connections":5,"connectionsPerSecond":2},"ingress":"uplink",` +
		`"reason":"nightly <backup> & \"restore\" ünïcode","ticket":"OPS-1","audience":"node-1",` +
		`"policyDigest":"` + strings.Repeat("0a", 32) + `"}`
	if string(body) != want {
		t.Errorf("payload is\n%s, want\n%s", body, want)
	}
}

func TestFacts(t *testing.T) {
	a, b := newKey(t), newKey(t)
	p := goodPayload()
	v := grant.Verified{Payload: p, Signers: []policy.Signer{
		{Person: "zoe", KeyID: "1"}, {Person: "alice", KeyID: a.Public().ID()}, {Person: "alice", KeyID: b.Public().ID()},
	}}
	own, at := []netip.Addr{netip.MustParseAddr("10.1.0.1")}, time.Unix(1, 0)
	want := policy.GrantFacts{
		ID: p.ID, Service: p.Service, Ports: p.Ports, Addresses: p.Addresses, Duration: p.Duration, Budget: p.Budget, Ingress: p.Ingress, Binding: p.Binding,
		Ticket: p.Ticket, Reason: p.Reason, Requester: p.Requester, Signers: v.Signers, NodeAddresses: own, Now: at,
	}
	if got := v.Facts(own, at); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestVerifySignatures(t *testing.T) {
	good, other := newForger(t), newForger(t)
	body := mustJSON(t, goodPayload())
	for !strings.ContainsAny(good.signature(body).Sig, "+/") {
		good = newForger(t) // one in ten has no letter that the alphabets differ in
	}
	tampered := bytes.Replace(body, []byte("10.1.0.2"), []byte("10.1.0.3"), 1)
	bad := good.signature(tampered)
	noise := dsse.Signature{KeyID: "sp:ffffffffffffffff", Sig: "AAAA"}
	wrongName := other.signature(body)
	wrongName.KeyID = good.public.ID()
	urlSafe := good.signature(body)
	urlSafe.Sig = strings.NewReplacer("+", "-", "/", "_").Replace(urlSafe.Sig)
	twoLines := good.signature(body)
	twoLines.Sig = twoLines.Sig[:40] + "\n" + twoLines.Sig[40:]
	odd := good.signature(body)
	odd.Sig = "not base64"
	for _, c := range []struct {
		name     string
		payload  []byte
		sigs     []dsse.Signature
		sentinel error
		field    string
	}{
		{"good", body, []dsse.Signature{good.signature(body)}, nil, ""},
		{"base64 for URLs", body, []dsse.Signature{urlSafe}, grant.ErrSignature, "signatures[0].sig"},
		{"base64 in two lines", body, []dsse.Signature{twoLines}, grant.ErrSignature, "signatures[0].sig"},
		{"unknown key beside a good one", body, []dsse.Signature{noise, good.signature(body)}, nil, ""},
		{"tampered payload", tampered, []dsse.Signature{good.signature(body)}, grant.ErrSignature, "signatures[0].sig"},
		{"signature of another payload", body, []dsse.Signature{bad}, grant.ErrSignature, "signatures[0].sig"},
		{"signature of another key", body, []dsse.Signature{wrongName}, grant.ErrSignature, "signatures[0].sig"},
		{"bad signature beside noise", body, []dsse.Signature{noise, bad}, grant.ErrSignature, "signatures[1].sig"},
		{"signature not base64", body, []dsse.Signature{odd}, grant.ErrSignature, "signatures[0].sig"},
		{"unknown key id", body, []dsse.Signature{other.signature(body)}, grant.ErrUnknownKey, "signatures[0].keyid"},
		{"no key id", body, []dsse.Signature{{Sig: good.signature(body).Sig}}, grant.ErrUnknownKey, "signatures[0].keyid"},
		{"no signature", body, []dsse.Signature{}, grant.ErrMalformed, "signatures"},
		{"same key twice", body, []dsse.Signature{good.signature(body), good.signature(body)}, grant.ErrMalformed, "signatures[1].keyid"},
		{"too many signatures", body, slices.Repeat([]dsse.Signature{noise}, 17), grant.ErrMalformed, "signatures"},
	} {
		t.Run(c.name, func(t *testing.T) {
			envelope := marshal(dsse.Envelope{
				PayloadType: grant.PayloadType, Payload: base64.StdEncoding.EncodeToString(c.payload), Signatures: c.sigs,
			})
			v, err := grant.Verify(envelope, good.keyring(), now)
			if c.sentinel == nil {
				if err != nil || len(v.Signers) != 1 {
					t.Errorf("got %+v, %v", v, err)
				}
				return
			}
			checkError(t, err, c.sentinel, c.field)
			if !reflect.DeepEqual(v, grant.Verified{}) {
				t.Error("a result came with the error")
			}
		})
	}
}

func TestVerifyExpiredKey(t *testing.T) {
	f := newForger(t)
	keys := f.keyring()
	keys[0].Spec.People[0].Keys[0].NotAfter = now
	envelope := f.envelope(mustJSON(t, goodPayload()))
	if _, err := grant.Verify(envelope, keys, now.Add(-1)); err != nil {
		t.Errorf("key before its end: %v", err)
	}
	_, err := grant.Verify(envelope, keys, now)
	checkError(t, err, grant.ErrKeyExpired, "signatures[0].keyid")
	if _, err := grant.Verify(envelope, nil, now); !errors.Is(err, grant.ErrUnknownKey) {
		t.Errorf("no keyring: %v", err)
	}
}

// TestVerifyLooksAtSignedPayloads signs what no honest signer would.
func TestVerifyLooksAtSignedPayloads(t *testing.T) {
	body := string(mustJSON(t, goodPayload()))
	for _, c := range []struct {
		name     string
		old, new string
		sentinel error
		field    string
	}{
		{"unknown field", `"ticket"`, `"tickets":"x","ticket"`, grant.ErrUnknownField, "tickets"},
		{"unknown field without a name", `"ticket"`, `"":1,"ticket"`, grant.ErrUnknownField, `""`},
		{"trailing data", `0a"}`, `0a"}{}`, grant.ErrTrailing, "payload"},
		{"trailing space", `0a"}`, `0a"} `, grant.ErrNotCanonical, "payload"},
		{"space within", `"ports":[`, `"ports": [`, grant.ErrNotCanonical, "payload"},
		{"key twice", `"ticket"`, `"ticket":"OPS-1","ticket"`, grant.ErrNotCanonical, "payload"},
		{"key in capitals", `"ticket"`, `"Ticket"`, grant.ErrNotCanonical, "payload"},
		{"another order", `"id":"01KAMXQ5T8W2J4N6R8V0Y2A4C6","requester":"backup@example.org"`, `"requester":"backup@example.org","id":"01KAMXQ5T8W2J4N6R8V0Y2A4C6"`, grant.ErrNotCanonical, "payload"},
		{"needless escape", `postgres`, `postgre\u0073`, grant.ErrNotCanonical, "payload"},
		{"other spelling of an address", `fd00:1::2`, `fd00:1:0::2`, grant.ErrNotCanonical, "payload"},
		{"time with an offset", `2026-11-22T03:00:00Z`, `2026-11-22T04:00:00+01:00`, grant.ErrNotCanonical, "payload"},
		{"longer duration text", `"15m"`, `"15m0s"`, grant.ErrNotCanonical, "payload"},
		{"empty list of ports", `"ports":[5432]`, `"ports":[]`, grant.ErrNotCanonical, "payload"},
		{"null", `"OPS-1"`, `null`, grant.ErrNotCanonical, "payload"},
		{"zero duration", `"15m"`, `"0s"`, grant.ErrInvalid, "duration"},
		{"no duration", `"duration":"15m",`, ``, grant.ErrInvalid, "duration"},
		{"duration as a number", `"15m"`, `900`, grant.ErrMalformed, "duration"},
		{"duration in words", `"15m"`, `"soon"`, grant.ErrInvalid, "duration"},
		{"empty reason", `"nightly <backup> & \"restore\" ünïcode"`, `""`, grant.ErrInvalid, "reason"},
		{"bad address", `10.1.0.2`, `10.1.0.256`, grant.ErrInvalid, "addresses[0]"},
		{"v4-mapped address", `10.1.0.2`, `::ffff:10.1.0.2`, grant.ErrInvalid, "addresses[0]"},
		{"bad time", `2026-11-22T03:00:00Z`, `yesterday`, grant.ErrInvalid, "notBefore"},
		{"port 0", `[5432]`, `[0]`, grant.ErrInvalid, "ports[0]"},
		{"port 65536", `[5432]`, `[65536]`, grant.ErrMalformed, "ports"},
		{"port as text", `[5432]`, `["5432"]`, grant.ErrMalformed, "ports"},
		{"list for the whole", body, `[]`, grant.ErrMalformed, "payload"},
		{"null for the whole", body, `null`, grant.ErrInvalid, "notBefore"},
		{"nothing", body, ``, grant.ErrMalformed, "payload"},
		{"cut off", `0a"}`, `0a`, grant.ErrMalformed, "payload"},
		{"no JSON", body, "\x00\xff", grant.ErrMalformed, "payload"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if !strings.Contains(body, c.old) {
				t.Fatalf("the payload does not have %q: %s", c.old, body)
			}
			f := newForger(t)
			v, err := grant.Verify(f.envelope([]byte(strings.Replace(body, c.old, c.new, 1))), f.keyring(), now)
			checkError(t, err, c.sentinel, c.field)
			if !reflect.DeepEqual(v, grant.Verified{}) {
				t.Error("a result came with the error")
			}
			if _, err := grant.Peek(f.envelope([]byte(strings.Replace(body, c.old, c.new, 1)))); !errors.Is(err, c.sentinel) {
				t.Errorf("Peek gives %v", err)
			}
		})
	}
}

func TestVerifyEnvelope(t *testing.T) {
	f := newForger(t)
	good := string(f.envelope(mustJSON(t, goodPayload())))
	var pretty bytes.Buffer
	if err := json.Indent(&pretty, []byte(good), "", "  "); err != nil {
		t.Fatal(err)
	}
	if _, err := grant.Verify(pretty.Bytes(), f.keyring(), now); err != nil {
		t.Errorf("an envelope with spaces: %v", err)
	}
	for _, c := range []struct {
		name     string
		envelope string
		sentinel error
		field    string
	}{
		{"empty", "", grant.ErrMalformed, "envelope"},
		{"no JSON", "grant", grant.ErrMalformed, "envelope"},
		{"list", "[]", grant.ErrMalformed, "envelope"},
		{"null", "null", grant.ErrMalformed, "payloadType"},
		{"cut off", good[:100], grant.ErrMalformed, "envelope"},
		{"unknown field", strings.Replace(good, "{", `{"x":1,`, 1), grant.ErrUnknownField, "x"},
		{"unknown field of a signature", strings.Replace(good, `{"keyid"`, `{"cert":"","keyid"`, 1), grant.ErrUnknownField, "cert"},
		{"trailing data", good + "{}", grant.ErrTrailing, "envelope"},
		{"trailing text", good + "x", grant.ErrTrailing, "envelope"},
		{"payload twice", strings.Replace(good, `"payload":`, `"payload":"AAAA","payload":`, 1), grant.ErrNotCanonical, "envelope"},
		{"payload in capitals", strings.Replace(good, `"payload":`, `"Payload":`, 1), grant.ErrNotCanonical, "envelope"},
		{"another type", strings.Replace(good, "grant.v1", "grant.v2", 1), grant.ErrMalformed, "payloadType"},
		{"type as a number", strings.Replace(good, `"application/vnd.sallyport.grant.v1+json"`, "1", 1), grant.ErrMalformed, "payloadType"},
		{"payload not base64", strings.Replace(good, `"payload":"`, `"payload":"!`, 1), grant.ErrMalformed, "payload"},
		{"signatures as text", good[:strings.Index(good, `"signatures":`)] + `"signatures":"x"}`, grant.ErrMalformed, "signatures"},
		{"no signatures", good[:strings.Index(good, `"signatures":`)] + `"signatures":null}`, grant.ErrMalformed, "signatures"},
		{"huge", good + strings.Repeat(" ", grant.MaxEnvelope), grant.ErrMalformed, "envelope"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := grant.Verify([]byte(c.envelope), f.keyring(), now)
			checkError(t, err, c.sentinel, c.field)
			if _, err := grant.Peek([]byte(c.envelope)); c.field != "signatures" && err == nil {
				t.Error("Peek takes it")
			}
		})
	}
}

// TestEveryChangedByteIsRefused flips each bit of an envelope once.
func TestEveryChangedByteIsRefused(t *testing.T) {
	f := newForger(t)
	good := f.envelope(mustJSON(t, goodPayload()))
	if _, err := grant.Verify(good, f.keyring(), now); err != nil {
		t.Fatal(err)
	}
	for i := range good {
		for bit := range 8 {
			changed := slices.Clone(good)
			changed[i] ^= 1 << bit
			if v, err := grant.Verify(changed, f.keyring(), now); err == nil {
				t.Fatalf("bit %d of byte %d changed, and the grant says %+v", bit, i, v)
			}
		}
	}
}

func TestRoundTripOfRandomPayloads(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	k := newKey(t)
	keys := keyring(person(t, "alice", k))
	for range 500 {
		p := randomPayload(t, r)
		envelope, err := grant.Sign(t.Context(), p, k)
		if err != nil {
			t.Fatalf("%+v: %v", p, err)
		}
		v, err := grant.Verify(envelope, keys, now)
		if err != nil {
			t.Fatalf("%+v: %v", p, err)
		}
		if !reflect.DeepEqual(v.Payload, utc(p)) {
			t.Fatalf("payload comes back as\n%+v, want\n%+v", v.Payload, p)
		}
		again, err := grant.Sign(t.Context(), v.Payload, k)
		if err != nil || !bytes.Equal(again, envelope) {
			t.Fatalf("the same payload has two envelopes: %v", err)
		}
		raw := mustJSON(t, p)
		var back grant.Payload
		if err := json.Unmarshal(raw, &back); err != nil || !reflect.DeepEqual(back, utc(p)) {
			t.Fatalf("JSON %s comes back as %+v, %v", raw, back, err)
		}
	}
}

func utc(p grant.Payload) grant.Payload {
	p.NotBefore, p.NotAfter = p.NotBefore.UTC(), p.NotAfter.UTC()
	return p
}

func randomPayload(t *testing.T, r *rand.Rand) grant.Payload {
	t.Helper()
	p := goodPayload()
	id, err := grant.NewID(now)
	if err != nil {
		t.Fatal(err)
	}
	p.ID = id
	p.Addresses = nil
	for i := range 1 + r.IntN(5) {
		p.Addresses = append(p.Addresses, netip.AddrFrom4([4]byte{10, byte(r.IntN(256)), byte(r.IntN(256)), byte(i)}))
	}
	if p.Ports = nil; r.IntN(2) == 0 {
		p.Ports = []uint16{uint16(1 + r.IntN(100)), uint16(101 + r.IntN(1000))}
	}
	zone := time.FixedZone("x", r.IntN(7200))
	p.NotBefore = now.Add(time.Duration(r.Int64N(int64(time.Hour)))).In(zone)
	p.NotAfter = p.NotBefore.Add(1 + time.Duration(r.Int64N(int64(grant.MaxWindow))))
	p.Duration = 1 + time.Duration(r.Int64N(int64(policy.MaxGrantDuration)))
	p.Reason = []string{"x", "<&>", `\"`, "日本語", "{}[]", "\u00e9e\u0301"}[r.IntN(6)]
	if r.IntN(2) == 0 {
		p.Ticket, p.PolicyDigest = "", ""
	}
	return p
}

func mustJSON(t testing.TB, p grant.Payload) []byte {
	t.Helper()
	// Not json.Marshal, whose escapes are not canonical.
	raw, err := p.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func FuzzVerify(f *testing.F) {
	forge := newForger(f)
	body := mustJSON(f, goodPayload())
	f.Add(body, false)
	f.Add(forge.envelope(body), true)
	f.Add([]byte(`{"id":"01KAMXQ5T8W2J4N6R8V0Y2A4C6","duration":"15m"}`), false)
	f.Add(bytes.Replace(body, []byte(`"connections":5`), []byte(`"connections":-5`), 1), false)
	f.Add(bytes.Replace(body, []byte(`"packets":1000000000`), []byte(`"packets":1e9`), 1), false)
	f.Add([]byte(`null`), false)
	f.Add([]byte(`[]`), true)
	f.Fuzz(func(t *testing.T, data []byte, raw bool) {
		envelope := data
		if !raw {
			envelope = forge.envelope(data)
		}
		v, err := grant.Verify(envelope, forge.keyring(), now)
		if err != nil {
			for _, e := range policy.Errors(err) {
				if e.Field == "" || e.Hint == "" || strings.ContainsAny(e.Error(), "\n\r\x1b") {
					t.Fatalf("bad error %q, field %q, hint %q", e.Error(), e.Field, e.Hint)
				}
			}
			return
		}
		canonical, err := v.Payload.MarshalJSON()
		if err != nil || v.Payload.Validate() != nil || v.Payload.Duration <= 0 || len(v.Signers) != 1 {
			t.Fatalf("took %+v", v)
		}
		if !raw && !bytes.Equal(canonical, data) {
			t.Fatalf("took %q, which is not %q", data, canonical)
		}
	})
}

func TestApproveHasABound(t *testing.T) {
	envelope, err := grant.Sign(t.Context(), goodPayload(), newKey(t))
	for i := 1; i < 16 && err == nil; i++ {
		envelope, err = grant.Approve(t.Context(), envelope, newKey(t))
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := grant.Approve(t.Context(), envelope, newKey(t)); !errors.Is(err, grant.ErrMalformed) {
		t.Errorf("a 17th signature: %v", err)
	}
}

func ExampleSign() {
	key, _ := grant.GenerateKey()
	id, _ := grant.NewID(time.Now())
	from := time.Now()
	envelope, err := grant.Sign(context.Background(), grant.Payload{
		ID: id, Requester: "backup", Service: "postgres", Binding: policy.BindingAddress,
		Addresses: []netip.Addr{netip.MustParseAddr("10.1.0.2")},
		NotBefore: from, NotAfter: from.Add(time.Hour), Duration: 15 * time.Minute,
		Reason: "nightly backup", Audience: "node-1",
	}, key)
	fmt.Println(json.Valid(envelope), err)
	// Output: true <nil>
}

// TestRecount: by any later keyrings, what was verified before counts as Verify says of the envelope anew.
func TestRecount(t *testing.T) {
	f, g := newForger(t), newForger(t)
	body := mustJSON(t, goodPayload())
	envelope := marshal(dsse.Envelope{PayloadType: grant.PayloadType, Payload: base64.StdEncoding.EncodeToString(body),
		Signatures: []dsse.Signature{f.signature(body), g.signature(body)}})
	now := time.Now()
	key := func(f forger, until time.Time) policy.Key { return policy.Key{PublicKey: f.public, NotAfter: until} }
	for name, people := range map[string][]policy.Person{
		"both":        {{Name: "alice", Keys: []policy.Key{key(f, time.Time{})}}, {Name: "bob", Keys: []policy.Key{key(g, time.Time{})}}},
		"renamed":     {{Name: "mallory", Keys: []policy.Key{key(g, time.Time{}), key(f, time.Time{})}}},
		"one is gone": {{Name: "alice", Keys: []policy.Key{key(f, time.Time{})}}},
		"one is over": {{Name: "alice", Keys: []policy.Key{key(f, now)}}, {Name: "bob", Keys: []policy.Key{key(g, now.Add(time.Second))}}},
		"both over":   {{Name: "alice", Keys: []policy.Key{key(f, now)}}, {Name: "bob", Keys: []policy.Key{key(g, now)}}},
		"strangers":   {{Name: "alice", Keys: []policy.Key{key(newForger(t), time.Time{})}}},
	} {
		for _, revoked := range [][]string{nil, {f.public.ID()}, {f.public.ID(), g.public.ID()}} {
			rings := keyring(people...)
			rings[0].Spec.RevokedKeys = revoked
			want, wrong := grant.Verify(envelope, rings, now)
			got, err := grant.Recount(goodPayload(), []string{f.public.ID(), g.public.ID()}, policy.KnownKeys(rings), now)
			if !reflect.DeepEqual(got, want) || (err == nil) != (wrong == nil) || err != nil && err.Error() != wrong.Error() {
				t.Errorf("%s, revoked %v: %+v, %v; want %+v, %v", name, revoked, got, err, want, wrong)
			}
		}
	}
	if _, err := grant.Recount(goodPayload(), nil, nil, now); err == nil {
		t.Error("nobody signed it")
	}
}
