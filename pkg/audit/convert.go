package audit

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"
	"unicode"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// Longest strings that FlowFromAPI takes, in bytes.
const (
	maxName   = 2048 // a SPIFFE ID is at most this long
	maxDetail = 512
)

// ErrRecord says that a flow record from outside is not one.
var ErrRecord = errors.New("flow record is malformed")

// FlowToAPI puts a record on the wire. Whatever FlowToAPI makes, FlowFromAPI takes back unchanged.
func FlowToAPI(r flow.Record) *api.FlowRecord {
	return &api.FlowRecord{
		Event: r.Event.String(), Time: timestamp(r.Time), Boot: durationpb.New(r.Boot), Cpu: int32(r.CPU), Seq: r.Seq, FlowId: r.FlowID,
		Verdict: r.Verdict.String(), Reason: r.Reason.String(), Protocol: r.Protocol, Client: addrPort(r.Client), Server: addrPort(r.Server),
		Service: r.Service, Device: r.Device, Identity: r.Identity, Grant: r.Grant, Slot: r.Slot,
		BytesToServer: r.BytesToServer, BytesToClient: r.BytesToClient, PacketsToServer: r.PacketsToServer, PacketsToClient: r.PacketsToClient,
		Count: r.Count, Detail: r.Detail, Proof: r.Proof, Application: r.Application, Caller: WorkloadToAPI(r.Caller), Request: requestToAPI(r.Request),
	}
}

// WorkloadToAPI puts a caller on the wire; nil stays nil.
func WorkloadToAPI(w *flow.Workload) *api.Workload {
	if w == nil {
		return nil
	}
	return &api.Workload{Identity: w.Identity, Pod: w.Pod, Container: w.Container, Cgroup: w.Cgroup, Pid: w.PID, Started: w.Started, Why: w.Why}
}

func requestToAPI(r *flow.Request) *api.Request {
	if r == nil {
		return nil
	}
	return &api.Request{Number: r.Number, Method: r.Method, Host: r.Host, Path: r.Path, Status: uint32(r.Status), Rule: r.Rule, Took: durationpb.New(r.Took)}
}

// FlowFromAPI reads a record of a sender that is not trusted: names must be known, addresses must be
// addresses, and no string may be long or hold control characters (those of the detail are taken
// out). Errors are ErrRecord and name every field that is wrong.
func FlowFromAPI(m *api.FlowRecord) (flow.Record, error) {
	p := parser{}
	r := flow.Record{
		Event: field(&p, "event", m.GetEvent(), flow.ParseEvent), Verdict: field(&p, "verdict", m.GetVerdict(), flow.ParseVerdict),
		Reason: field(&p, "reason", m.GetReason(), flow.ParseReason),
		Client: field(&p, "client", m.GetClient(), parseAddrPort), Server: field(&p, "server", m.GetServer(), parseAddrPort),
		FlowID: field(&p, "flow_id", m.GetFlowId(), plain), Protocol: field(&p, "protocol", m.GetProtocol(), plain),
		Service: field(&p, "service", m.GetService(), plain), Device: field(&p, "device", m.GetDevice(), plain),
		Identity: field(&p, "identity", m.GetIdentity(), plain), Grant: field(&p, "grant", m.GetGrant(), plain),
		Time: field(&p, "time", m.GetTime(), parseTime), Boot: field(&p, "boot", m.GetBoot(), parseDuration),
		CPU: int(m.GetCpu()), Seq: m.GetSeq(), Slot: m.GetSlot(),
		BytesToServer: m.GetBytesToServer(), BytesToClient: m.GetBytesToClient(),
		PacketsToServer: m.GetPacketsToServer(), PacketsToClient: m.GetPacketsToClient(),
		Count: m.GetCount(), Detail: oneLine(m.GetDetail()),
		Proof: field(&p, "proof", m.GetProof(), plain), Application: field(&p, "application", m.GetApplication(), plain),
		Caller: field(&p, "caller", m.GetCaller(), parseWorkload), Request: field(&p, "request", m.GetRequest(), parseRequest),
	}
	if len(p.errs) > 0 {
		return flow.Record{}, fmt.Errorf("%w: %w", ErrRecord, errors.Join(p.errs...))
	}
	return r, nil
}

func parseWorkload(m *api.Workload) (*flow.Workload, error) {
	if m == nil {
		return nil, nil
	}
	p := parser{}
	w := &flow.Workload{
		Identity: field(&p, "identity", m.GetIdentity(), plain), Pod: field(&p, "pod", m.GetPod(), plain),
		Container: field(&p, "container", m.GetContainer(), plain), Why: oneLine(m.GetWhy()),
		Cgroup: m.GetCgroup(), PID: m.GetPid(), Started: m.GetStarted(),
	}
	return w, errors.Join(p.errs...)
}

func parseRequest(m *api.Request) (*flow.Request, error) {
	if m == nil {
		return nil, nil
	}
	p := parser{}
	r := &flow.Request{
		Number: m.GetNumber(), Method: field(&p, "method", m.GetMethod(), plain), Host: field(&p, "host", m.GetHost(), plain),
		Path: field(&p, "path", m.GetPath(), plain), Status: int(m.GetStatus()), Rule: field(&p, "rule", m.GetRule(), plain),
		Took: field(&p, "took", m.GetTook(), parseDuration),
	}
	return r, errors.Join(p.errs...)
}

// GrantEntry makes the critical entry of a grant event, for the store.
func GrantEntry(ev *api.GrantEvent) ([]byte, error) {
	return proto.Marshal(&api.Entry{Record: &api.Entry_Grant{Grant: ev}})
}

type parser struct{ errs []error }

func field[In, Out any](p *parser, name string, in In, parse func(In) (Out, error)) Out {
	out, err := parse(in)
	if err != nil {
		p.errs = append(p.errs, fmt.Errorf("%s: %w", name, err))
	}
	return out
}

func plain(s string) (string, error) {
	if len(s) > maxName {
		return "", fmt.Errorf("%d bytes long, at most %d", len(s), maxName)
	}
	if strings.ContainsFunc(s, unicode.IsControl) {
		return "", fmt.Errorf("%q has control characters", s)
	}
	return s, nil
}

func oneLine(s string) string {
	s = strings.ToValidUTF8(s[:min(len(s), maxDetail)], "")
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return -1
		}
		return r
	}, s)
}

func parseTime(ts *timestamppb.Timestamp) (time.Time, error) {
	if ts == nil {
		return time.Time{}, nil
	}
	return ts.AsTime(), ts.CheckValid()
}

func wireTime(ts *timestamppb.Timestamp) time.Time {
	if ts == nil {
		return time.Time{}
	}
	return ts.AsTime()
}

func parseDuration(d *durationpb.Duration) (time.Duration, error) {
	if d == nil {
		return 0, nil
	}
	return d.AsDuration(), d.CheckValid()
}

func parseAddrPort(s string) (netip.AddrPort, error) {
	if s == "" {
		return netip.AddrPort{}, nil
	}
	return netip.ParseAddrPort(s)
}

func addrPort(a netip.AddrPort) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
