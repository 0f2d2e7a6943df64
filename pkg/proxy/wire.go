package proxy

import (
	"net/netip"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// toWire puts a record of the proxy on the wire. The reader is pkg/audit, which is not imported
// here: its store would come along into the process that parses untrusted bytes. A test holds the
// two together.
func toWire(r flow.Record) *api.FlowRecord {
	return &api.FlowRecord{
		Event:         r.Event.String(),
		Time:          timestamppb.New(r.Time),
		Boot:          durationpb.New(r.Boot),
		Cpu:           int32(r.CPU),
		Seq:           r.Seq,
		FlowId:        r.FlowID,
		Verdict:       r.Verdict.String(),
		Reason:        r.Reason.String(),
		Protocol:      r.Protocol,
		Client:        wireAddr(r.Client),
		Server:        wireAddr(r.Server),
		Service:       r.Service,
		Identity:      r.Identity,
		BytesToServer: r.BytesToServer,
		BytesToClient: r.BytesToClient,
		Count:         r.Count,
		Detail:        r.Detail,
		Proof:         r.Proof,
		Application:   r.Application,
		Request:       requestToWire(r.Request),
	}
}

// requestToWire leaves out nothing. Whose socket a caller has is for the agent to say.
func requestToWire(r *flow.Request) *api.Request {
	if r == nil {
		return nil
	}
	return &api.Request{
		Number: r.Number, Method: r.Method, Host: r.Host, Path: r.Path,
		Status: uint32(r.Status), Rule: r.Rule, Took: durationpb.New(r.Took),
	}
}

func wireAddr(a netip.AddrPort) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}
