// Package flow holds the flow record, its verdicts and its reasons: the words in which every
// decision about traffic is told. It is pure.
package flow

import (
	"net/netip"
	"time"
)

//go:generate go run ../../tools/reasongen -object ../../bpf/sallyport_bpfel.o -out zz_generated_enums.go

// Record tells of one edge of one flow.
type Record struct {
	// Event is the edge that the record tells of.
	Event Event
	// Time is the wall-clock time of the edge. It is for people; nothing is decided by it.
	Time time.Time
	// Boot is the CLOCK_BOOTTIME reading of the edge, since the boot of the node.
	Boot time.Duration
	// CPU and Seq number the kernel's records: a gap in Seq on one CPU is a loss. The proxy's
	// records have CPU -1 and a sequence of their own.
	CPU int
	Seq uint64
	// FlowID joins the records of one flow. It is unique on a node for one boot.
	FlowID string

	Verdict Verdict
	Reason  Reason

	Protocol string // "tcp"
	Client   netip.AddrPort
	Server   netip.AddrPort
	Service  string // name of the protected service, empty if unknown
	Device   string // device at which the flow was decided, empty if unknown

	Identity string // SPIFFE ID, or provider and subject of a token, that was proven, or "" (unattested)
	Proof    string // how: "spiffe", "jwt", "oidc" or "local"; "" if it was not
	Grant    string // id of the grant, for bypassed flows
	Slot     uint32 // path slot, for bypassed flows

	// Volumes are IP bytes and packets in each direction (headers included) for bypassed flows, and
	// payload bytes for proxied ones, whose packets are zero.
	BytesToServer, BytesToClient     uint64
	PacketsToServer, PacketsToClient uint64

	// Count is how many equal denials the record stands for; at least 1.
	Count uint64
	// Detail is one line for people, already stripped of control characters.
	Detail string

	// Application is the protocol inside, where the proxy knows it: "http/1.1", "h2", "ssh"; "" for bytes.
	Application string
	// Caller is whose socket a client on the node itself has; nil: it is elsewhere, or nobody knows.
	Caller *Workload
	// Request is what an EventRequest tells of; nil in every other record.
	Request *Request
}

// DetailLeft is in the detail of a denial whose client was refused nothing: it connected and left, as probes do.
const DetailLeft = "client left before its first byte"

// Workload is whose socket it is, as far as the node proves it. What is not proven is empty.
type Workload struct {
	Identity  string // SPIFFE ID; "": unattested, and Why says why
	Pod       string // UID
	Container string // id
	Cgroup    uint64 // id of its control group
	PID       int32  // of a process outside of pods, in the node's PID namespace
	Started   uint64 // of that process, in clock ticks after boot (proc(5), starttime)
	Why       string
}

// Request is one HTTP request; the FlowID of its record is that of its connection.
type Request struct {
	Number uint64 // on its connection, from 1 on
	Method string
	Host   string
	Path   string // canonical, without query
	Status int    // of the answer; 0: there was none
	Rule   string // that allowed it
	Took   time.Duration
}
