package audit

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

func randomRecord(rng *rand.Rand) flow.Record {
	addr := func() netip.AddrPort {
		switch rng.IntN(3) {
		case 0:
			return netip.AddrPort{}
		case 1:
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(rng.Uint32()), 0, 1}), uint16(rng.Uint32()))
		}
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte{0xfd, byte(rng.Uint32()), 15: 1}), uint16(rng.Uint32()))
	}
	text := func(s string) string { return strings.Repeat(s, rng.IntN(3)) }
	reasons := flow.Reasons()
	r := flow.Record{
		Event: flow.Event(rng.IntN(6)), Verdict: flow.Verdict(rng.IntN(4)), Reason: reasons[rng.IntN(len(reasons))],
		Boot: time.Duration(rng.Int64()), CPU: rng.IntN(64) - 1, Seq: rng.Uint64(), FlowID: text("f-1"), Protocol: text("tcp"),
		Client: addr(), Server: addr(), Service: text("postgres"), Device: text("eth0"), Identity: text("spiffe://example.org/a"),
		Grant: text("01J"), Slot: rng.Uint32(), BytesToServer: rng.Uint64(), BytesToClient: rng.Uint64(),
		PacketsToServer: rng.Uint64(), PacketsToClient: rng.Uint64(), Count: rng.Uint64(), Detail: text("no rule för it "),
		Proof: text("jwt"), Application: text("h2"),
	}
	if rng.IntN(2) > 0 {
		r.Caller = &flow.Workload{Identity: text("spiffe://example.org/b"), Pod: text("uid"), Container: text("cc"), Cgroup: rng.Uint64(),
			PID: rng.Int32(), Started: rng.Uint64(), Why: text("gone")}
	}
	if rng.IntN(2) > 0 {
		r.Request = &flow.Request{Number: rng.Uint64(), Method: text("GET"), Host: text("web"), Path: text("/a"), Status: rng.IntN(600),
			Rule: text("access[0]"), Took: time.Duration(rng.Int64())}
	}
	if rng.IntN(4) > 0 {
		r.Time = time.Unix(rng.Int64N(1<<32), rng.Int64N(1e9)).UTC()
	}
	return r
}

func TestFlowRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for range 2000 {
		want := randomRecord(rng)
		data, err := proto.Marshal(FlowToAPI(want))
		if err != nil {
			t.Fatal(err)
		}
		var m api.FlowRecord
		if err := proto.Unmarshal(data, &m); err != nil {
			t.Fatal(err)
		}
		if got, err := FlowFromAPI(&m); err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("have %+v, %v\nwant %+v", got, err, want)
		}
	}
}

func TestFlowFromAPIRefuses(t *testing.T) {
	for name, spoil := range map[string]func(*api.FlowRecord){
		"event":    func(m *api.FlowRecord) { m.Event = "EXPLODED" },
		"verdict":  func(m *api.FlowRecord) { m.Verdict = "" },
		"reason":   func(m *api.FlowRecord) { m.Reason = "BECAUSE" },
		"client":   func(m *api.FlowRecord) { m.Client = "10.0.0.1" },
		"server":   func(m *api.FlowRecord) { m.Server = "example.org:1" },
		"identity": func(m *api.FlowRecord) { m.Identity = "spiffe://a/\x1b[2J" },
		"service":  func(m *api.FlowRecord) { m.Service = strings.Repeat("x", maxName+1) },
		"path":     func(m *api.FlowRecord) { m.Request = &api.Request{Path: "/\x1b[2J"} },
		"pod":      func(m *api.FlowRecord) { m.Caller = &api.Workload{Pod: "\n"} },
		"time":     func(m *api.FlowRecord) { m.Time = timestamp(time.Unix(1, 0)); m.Time.Nanos = -1 },
	} {
		m := FlowToAPI(randomRecord(rand.New(rand.NewPCG(1, 1))))
		spoil(m)
		if _, err := FlowFromAPI(m); !errors.Is(err, ErrRecord) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	m := FlowToAPI(flow.Record{})
	m.Detail = "a\nb\x00" + strings.Repeat("ä", maxDetail)
	if r, err := FlowFromAPI(m); err != nil || strings.ContainsAny(r.Detail, "\n\x00") || len(r.Detail) > maxDetail {
		t.Errorf("detail is %q, %v", r.Detail, err)
	}
}

// What FlowFromAPI takes can be shown, sent on and taken again.
func FuzzFlowFromAPI(f *testing.F) {
	rng := rand.New(rand.NewPCG(5, 6))
	for range 10 {
		data, _ := proto.Marshal(FlowToAPI(randomRecord(rng)))
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var m api.FlowRecord
		if proto.Unmarshal(data, &m) != nil {
			return
		}
		r, err := FlowFromAPI(&m)
		if err != nil {
			return
		}
		again, err := FlowFromAPI(FlowToAPI(r))
		if err != nil || !reflect.DeepEqual(again, r) {
			t.Errorf("have %+v, %v\nwant %+v", again, err, r)
		}
	})
}
