package main

import (
	"net/netip"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

// ocsfVersion is the version of the Open Cybersecurity Schema Framework that events are written in.
const ocsfVersion = "1.3.0"

// ocsfEvent are the fields that both classes have here. What of a record has no place in the schema is in unmapped, by its name in the API.
type ocsfEvent struct {
	ActivityID   int            `json:"activity_id"`
	ActivityName string         `json:"activity_name"`
	CategoryUID  int            `json:"category_uid"`
	CategoryName string         `json:"category_name"`
	ClassUID     int            `json:"class_uid"`
	ClassName    string         `json:"class_name"`
	TypeUID      int            `json:"type_uid"`
	TypeName     string         `json:"type_name"`
	SeverityID   int            `json:"severity_id"`
	StatusID     int            `json:"status_id,omitempty"`
	StatusCode   string         `json:"status_code,omitempty"`
	StatusDetail string         `json:"status_detail,omitempty"`
	Time         int64          `json:"time"`
	Count        uint64         `json:"count,omitempty"`
	Message      string         `json:"message"`
	Metadata     ocsfMetadata   `json:"metadata"`
	Device       ocsfDevice     `json:"device"`
	Actor        *ocsfActor     `json:"actor,omitempty"`
	Unmapped     map[string]any `json:"unmapped,omitempty"`
}

// ocsfNetwork is an event of the class Network Activity, with the profiles host and security_control.
type ocsfNetwork struct {
	ocsfEvent
	ActionID       int                 `json:"action_id"`
	DispositionID  int                 `json:"disposition_id"`
	Authorizations []ocsfAuthorization `json:"authorizations,omitempty"`
	Connection     ocsfConnection      `json:"connection_info"`
	Source         *ocsfEndpoint       `json:"src_endpoint,omitempty"`
	Destination    ocsfEndpoint        `json:"dst_endpoint"`
	Traffic        *ocsfTraffic        `json:"traffic,omitempty"`
}

// ocsfEntity is an event of the class Entity Management, with the profile host. The entity is the grant.
type ocsfEntity struct {
	ocsfEvent
	Comment string      `json:"comment,omitempty"`
	Entity  ocsfManaged `json:"entity"`
}

type ocsfMetadata struct {
	Version  string      `json:"version"`
	Product  ocsfProduct `json:"product"`
	Profiles []string    `json:"profiles"`
	UID      string      `json:"uid"` // what --record takes
	LogName  string      `json:"log_name"`
	Logged   int64       `json:"logged_time,omitempty"`
}

type ocsfProduct struct {
	Name   string `json:"name"`
	Vendor string `json:"vendor_name"`
}

type ocsfDevice struct {
	TypeID   int    `json:"type_id"`
	Hostname string `json:"hostname"`
}

type ocsfActor struct {
	AppUID string    `json:"app_uid,omitempty"`
	User   *ocsfUser `json:"user,omitempty"`
}

type ocsfUser struct {
	Name string `json:"name"`
}

type ocsfAuthorization struct {
	Decision string     `json:"decision"`
	Policy   ocsfPolicy `json:"policy"`
}

type ocsfPolicy struct {
	Name string `json:"name"`
	UID  string `json:"uid"`
}

type ocsfConnection struct {
	DirectionID int    `json:"direction_id"`
	Protocol    string `json:"protocol_name,omitempty"`
	Number      int    `json:"protocol_num,omitempty"`
	VersionID   int    `json:"protocol_ver_id"`
	UID         string `json:"uid,omitempty"`
}

type ocsfEndpoint struct {
	IP        string `json:"ip,omitempty"`
	Port      uint16 `json:"port,omitempty"`
	Service   string `json:"svc_name,omitempty"`
	Interface string `json:"interface_name,omitempty"`
	Name      string `json:"name,omitempty"`
}

type ocsfTraffic struct {
	Bytes      uint64 `json:"bytes"`
	BytesIn    uint64 `json:"bytes_in"`  // from the server
	BytesOut   uint64 `json:"bytes_out"` // to it
	Packets    uint64 `json:"packets,omitempty"`
	PacketsIn  uint64 `json:"packets_in,omitempty"`
	PacketsOut uint64 `json:"packets_out,omitempty"`
}

type ocsfManaged struct {
	Name string    `json:"name,omitempty"`
	UID  string    `json:"uid,omitempty"`
	Type string    `json:"type"`
	User *ocsfUser `json:"user,omitempty"`
}

// Numbers of the schema.
const (
	ocsfInformational, ocsfLow, ocsfMedium, ocsfHigh = 1, 2, 3, 4
	ocsfSuccess, ocsfFailure                         = 1, 2
	ocsfAllowed, ocsfDenied                          = 1, 2 // action_id
	ocsfBlocked, ocsfLogged                          = 2, 17
	ocsfOther                                        = 99
)

// activity is what an event or a step is in a class of the schema.
type activity struct {
	id       int
	name     string
	severity int
}

var flowActivities = map[string]activity{
	"OPEN":     {1, "Open", ocsfInformational},
	"CLOSE":    {2, "Close", ocsfInformational},
	"END":      {3, "Reset", ocsfInformational},
	"DENY":     {5, "Refuse", ocsfLow},
	"UPDATE":   {6, "Traffic", ocsfInformational},
	"WATCHED":  {6, "Traffic", ocsfInformational},
	"REQUEST":  {6, "Traffic", ocsfInformational},
	"BACKSTOP": {5, "Refuse", ocsfHigh},
}

var grantActivities = map[string]activity{
	"ACTIVATED":   {10, "Activate", ocsfInformational},
	"REFUSED":     {10, "Activate", ocsfLow},
	"REVOKED":     {11, "Deactivate", ocsfInformational},
	"EXPIRED":     {11, "Deactivate", ocsfInformational},
	"SPENT":       {11, "Deactivate", ocsfInformational},
	"IDLE":        {11, "Deactivate", ocsfInformational},
	"ROLLED_BACK": {11, "Deactivate", ocsfInformational},
	"UNINSTALLED": {11, "Deactivate", ocsfLow},
	"PANIC":       {11, "Deactivate", ocsfHigh},
	"WITHDRAWN":   {9, "Disable", ocsfInformational},
	"DENIED":      {9, "Disable", ocsfLow},
	"LIFTED":      {8, "Enable", ocsfLow},
	"ADVANCED":    {3, "Update", ocsfInformational},
	"RESUMED":     {3, "Update", ocsfInformational},
	"ROLLED_OUT":  {3, "Update", ocsfInformational},
	"HALTED":      {9, "Disable", ocsfLow},
	"FELL_BACK":   {9, "Disable", ocsfHigh},
	"REVIEWED":    {3, "Update", ocsfInformational},
	"SIGNALLED":   {3, "Update", ocsfLow},
	"ALARM":       {ocsfOther, "Alarm", ocsfHigh},
}

// activityOf finds one, or makes one of a word that has none here.
func activityOf(known map[string]activity, word string) activity {
	if a, ok := known[word]; ok {
		return a
	}
	if word == "" {
		return activity{0, "Unknown", ocsfInformational}
	}
	return activity{ocsfOther, word, ocsfInformational}
}

func ocsfFlow(s *api.StoredFlow) ocsfNetwork {
	r := s.GetFlow()
	e := ocsfNetwork{ocsfEvent: newEvent(4, "Network Activity", 1, "Network Activity", activityOf(flowActivities, r.GetEvent()))}
	e.about(s.GetNode(), s.GetEpoch(), className(s.GetClass()), s.GetSeq(), s.GetReceived(), r.GetTime())
	e.Metadata.Profiles = []string{"host", "security_control"}
	e.StatusCode, e.StatusDetail, e.Count = r.GetReason(), r.GetDetail(), r.GetCount()
	e.Message = strings.Join([]string{r.GetEvent(), r.GetVerdict(), r.GetReason(), r.GetClient(), "to", r.GetServer()}, " ")
	e.decide(r)
	if r.GetIdentity() != "" {
		e.Actor = &ocsfActor{AppUID: r.GetIdentity()}
	}
	client, _ := netip.ParseAddrPort(r.GetClient())
	server, _ := netip.ParseAddrPort(r.GetServer())
	e.Connection = ocsfConnection{Protocol: r.GetProtocol(), Number: map[string]int{"tcp": 6, "udp": 17}[r.GetProtocol()], VersionID: ipVersion(server.Addr()), UID: r.GetFlowId()}
	if client.IsValid() {
		e.Source = &ocsfEndpoint{IP: client.Addr().String(), Port: client.Port()}
	}
	e.Destination = ocsfEndpoint{Service: r.GetService(), Interface: r.GetDevice()}
	if server.IsValid() {
		e.Destination.IP, e.Destination.Port = server.Addr().String(), server.Port()
	} else if e.Destination == (ocsfEndpoint{}) {
		e.Destination.Name = s.GetNode() // the schema wants one
	}
	if in, out := r.GetBytesToClient(), r.GetBytesToServer(); in+out+r.GetPacketsToClient()+r.GetPacketsToServer() > 0 {
		e.Traffic = &ocsfTraffic{in + out, in, out, r.GetPacketsToClient() + r.GetPacketsToServer(), r.GetPacketsToClient(), r.GetPacketsToServer()}
	}
	e.Unmapped = unmapped(r, "event", "verdict", "boot", "cpu", "seq", "slot", "proof", "application", "caller", "request")
	return e
}

// decide tells what was decided. A service that is only watched lets everything pass, whatever its verdict says.
func (e *ocsfNetwork) decide(r *api.FlowRecord) {
	e.StatusID, e.ActionID, e.DispositionID = ocsfSuccess, ocsfAllowed, ocsfAllowed
	decision := "allowed"
	switch {
	case r.GetEvent() == "WATCHED":
		e.DispositionID = ocsfLogged
	case r.GetVerdict() == "DENIED":
		e.StatusID, e.ActionID, e.DispositionID = ocsfFailure, ocsfDenied, ocsfBlocked
		decision = "denied"
	case r.GetVerdict() != "PROXIED" && r.GetVerdict() != "BYPASSED":
		e.StatusID, e.ActionID, e.DispositionID = 0, 0, 0
	}
	if r.GetGrant() != "" {
		e.Authorizations = []ocsfAuthorization{{decision, ocsfPolicy{"grant", r.GetGrant()}}}
	}
}

func ocsfGrant(s *api.StoredGrantEvent) ocsfEntity {
	g := s.GetEvent()
	e := ocsfEntity{ocsfEvent: newEvent(3, "Identity & Access Management", 4, "Entity Management", activityOf(grantActivities, g.GetStep())), Comment: g.GetWhy()}
	e.about(s.GetNode(), s.GetEpoch(), proof.ClassCritical, s.GetSeq(), s.GetReceived(), g.GetTime())
	e.Metadata.Profiles = []string{"host"}
	e.StatusID = ocsfSuccess
	if g.GetStep() == "REFUSED" {
		e.StatusID, e.StatusDetail = ocsfFailure, g.GetWhy()
	}
	if g.GetStep() == "ACTIVATED" && g.GetKind() == string(grant.BreakGlass) {
		e.SeverityID = ocsfHigh
	}
	e.StatusCode = g.GetStep()
	e.Message = strings.Join(strings.Fields("grant "+g.GetStep()+" "+g.GetGrant()+" "+g.GetService()), " ")
	if g.GetActor() != "" {
		e.Actor = &ocsfActor{User: &ocsfUser{g.GetActor()}}
	}
	e.Entity = ocsfManaged{Name: g.GetService(), UID: g.GetGrant(), Type: "grant"}
	if g.GetRequester() != "" {
		e.Entity.User = &ocsfUser{g.GetRequester()}
	}
	if g.GetGrant() == "" && g.GetService() == "" {
		e.Entity.Name, e.Entity.Type = s.GetNode(), "node" // a step of the whole node
	}
	e.Unmapped = unmapped(g, "boot", "clients", "deadline", "slots", "envelope", "signers", "kind", "signals")
	return e
}

func newEvent(category int, categoryName string, class int, className string, a activity) ocsfEvent {
	uid := category*1000 + class
	return ocsfEvent{
		ActivityID: a.id, ActivityName: a.name, CategoryUID: category, CategoryName: categoryName, ClassUID: uid, ClassName: className,
		TypeUID: uid*100 + a.id, TypeName: className + ": " + a.name, SeverityID: a.severity,
	}
}

// about says which record the event is of.
func (e *ocsfEvent) about(node, epoch, class string, seq uint64, received, at *timestamppb.Timestamp) {
	e.Metadata = ocsfMetadata{Version: ocsfVersion, Product: ocsfProduct{"Sallyport", "Sallyport"}, UID: recordID(node, epoch, class, seq), LogName: class, Logged: millis(received)}
	e.Device = ocsfDevice{Hostname: node}
	e.Time = millis(at)
	if at == nil {
		e.Time = millis(received)
	}
}

func millis(t *timestamppb.Timestamp) int64 {
	if t == nil {
		return 0
	}
	return t.AsTime().UnixMilli()
}

func ipVersion(a netip.Addr) int {
	switch {
	case a.Is4():
		return 4
	case a.Is6():
		return 6
	}
	return 0
}

// unmapped are fields of a message by their names in the API, those that are set. Numbers of 64 bits stay what they are.
func unmapped(m proto.Message, names ...string) map[string]any {
	out := map[string]any{}
	r := m.ProtoReflect()
	for _, name := range names {
		f := r.Descriptor().Fields().ByName(protoreflect.Name(name))
		if r.Has(f) {
			out[name] = plainField(f, r.Get(f))
		}
	}
	return out
}
