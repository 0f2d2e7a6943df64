package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

var update = flag.Bool("update", false, "write golden files anew")

// schema is what OCSF 1.3.0 asks of our events: of the two classes, with the profiles host and security_control, and of the objects in
// them, the attributes that are required or that we use, as testdata/ocsf/attributes.json lists them.
type schema struct {
	Version string                  `json:"version"`
	Classes map[string]*schemaThing `json:"classes"`
	Objects map[string]*schemaThing `json:"objects"`
}

type schemaThing struct {
	Caption      string                     `json:"caption"`
	UID          int                        `json:"uid"`
	CategoryUID  int                        `json:"category_uid"`
	CategoryName string                     `json:"category_name"`
	AtLeastOne   []string                   `json:"at_least_one"`
	Attributes   map[string]schemaAttribute `json:"attributes"`
}

type schemaAttribute struct {
	Type        string            `json:"type"`
	Requirement string            `json:"requirement"`
	Profile     string            `json:"profile"`
	Array       bool              `json:"array"`
	Enum        map[string]string `json:"enum"`
}

// check holds an event against its class.
func (s *schema) check(event map[string]any) []string {
	class := s.Classes[fmt.Sprint(event["class_uid"])]
	if class == nil {
		return []string{fmt.Sprintf("no class %v", event["class_uid"])}
	}
	activity := class.Attributes["activity_id"].Enum[fmt.Sprint(event["activity_id"])]
	problems := s.checkThing("event", class, event, strings.Fields(strings.Trim(fmt.Sprint(at(event, "metadata", "profiles")), "[]")))
	for name, want := range map[string]any{
		"category_uid": class.CategoryUID, "category_name": class.CategoryName, "class_name": class.Caption,
		"type_uid": fmt.Sprintf("%v%02v", event["class_uid"], event["activity_id"]), "type_name": fmt.Sprintf("%s: %v", class.Caption, event["activity_name"]),
	} {
		if fmt.Sprint(event[name]) != fmt.Sprint(want) {
			problems = append(problems, fmt.Sprintf("%s is %v, not %v", name, event[name], want))
		}
	}
	if activity != "Other" && activity != event["activity_name"] {
		problems = append(problems, fmt.Sprintf("activity %v is %q, not %q", event["activity_id"], activity, event["activity_name"]))
	}
	if v := at(event, "metadata", "version"); v != s.Version {
		problems = append(problems, fmt.Sprintf("version is %v", v))
	}
	return problems
}

func at(v any, path ...string) any {
	for _, p := range path {
		m, _ := v.(map[string]any)
		v = m[p]
	}
	return v
}

func (s *schema) checkThing(where string, thing *schemaThing, value map[string]any, profiles []string) (problems []string) {
	for name, a := range thing.Attributes {
		if _, ok := value[name]; !ok && a.Requirement == "required" && (a.Profile == "" || slices.Contains(profiles, a.Profile)) {
			problems = append(problems, where+"."+name+" is required")
		}
	}
	if len(thing.AtLeastOne) > 0 && !slices.ContainsFunc(thing.AtLeastOne, func(n string) bool { return value[n] != nil }) {
		problems = append(problems, fmt.Sprintf("%s has none of %v", where, thing.AtLeastOne))
	}
	for name, v := range value {
		a, ok := thing.Attributes[name]
		if !ok || a.Profile != "" && !slices.Contains(profiles, a.Profile) {
			problems = append(problems, where+"."+name+" is not in the schema")
			continue
		}
		list, isList := v.([]any)
		if isList != a.Array {
			problems = append(problems, where+"."+name+" is a list, or is none")
		}
		if !isList {
			list = []any{v}
		}
		for _, v := range list {
			problems = append(problems, s.checkValue(where+"."+name, a, v, profiles)...)
		}
	}
	return problems
}

func (s *schema) checkValue(where string, a schemaAttribute, v any, profiles []string) []string {
	var ok bool
	switch a.Type {
	case "integer_t", "long_t", "timestamp_t", "port_t":
		var n json.Number
		if n, ok = v.(json.Number); ok && a.Enum != nil && !strings.HasSuffix(where, "_uid") {
			_, ok = a.Enum[n.String()]
		}
	case "string_t", "ip_t", "hostname_t", "username_t", "resource_uid_t":
		var text string
		text, ok = v.(string)
		ok = ok && text != ""
	case "object":
		_, ok = v.(map[string]any) // unmapped
	default:
		thing, known := s.Objects[a.Type]
		m, isMap := v.(map[string]any)
		if known && isMap {
			return s.checkThing(where, thing, m, profiles)
		}
		ok = false
	}
	if !ok {
		return []string{fmt.Sprintf("%s is %v, no %s", where, v, a.Type)}
	}
	return nil
}

func readSchema(t *testing.T) *schema {
	t.Helper()
	data, err := os.ReadFile("testdata/ocsf/attributes.json")
	if err != nil {
		t.Fatal(err)
	}
	var s schema
	if err := json.Unmarshal(data, &s); err != nil {
		t.Fatal(err)
	}
	return &s
}

func asEvent(t *testing.T, v any) map[string]any {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return parseEvent(t, data)
}

func parseEvent(t *testing.T, data []byte) map[string]any {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	var event map[string]any
	if err := d.Decode(&event); err != nil {
		t.Fatal(err)
	}
	return event
}

// exported are events of every kind of record, full ones and empty ones.
func exported() (all []any) {
	add := func(r *api.FlowRecord) {
		all = append(all, ocsfFlow(&api.StoredFlow{Node: "node-1", Epoch: "E", Seq: 7, Class: api.Class_CLASS_FLOW, Received: timestamppb.New(began), Flow: r}))
	}
	for _, r := range someFlows() {
		add(r)
	}
	for _, event := range append(eventWords(), "none", "later") {
		for v := flow.VerdictNone; v <= flow.VerdictDenied; v++ {
			add(&api.FlowRecord{Event: strings.ToUpper(event), Verdict: v.String(), Reason: "NO_PATH", Protocol: "udp"})
		}
	}
	add(&api.FlowRecord{})
	steps := []string{"", "LATER", "ACTIVATED", "REVOKED", "EXPIRED", "SPENT", "IDLE", "WARNED", "SIGNALLED", "REFUSED", "UNINSTALLED", "ALARM", "ROLLED_BACK", "PANIC", "LIFTED", "WITHDRAWN", "DENIED", "REVIEWED", "VOUCHED", "ADVANCED", "HALTED", "RESUMED", "FELL_BACK", "ROLLED_OUT"}
	for _, step := range steps {
		full := &api.GrantEvent{Grant: "01J8ZQ4X5M3T9V0Y2B7C6D1E4F", Step: step, Time: timestamppb.New(began), Boot: durationpb.New(time.Hour), Requester: "bob", Actor: "uid:0", Service: "postgres",
			Clients: []string{"10.1.0.2"}, Deadline: timestamppb.New(began.Add(time.Minute)), Slots: []uint32{0, 3}, Why: "because", Envelope: []byte("{}"), Signers: []string{"K"}, Kind: "breakGlass", Signals: []string{"one"}}
		for _, g := range []*api.GrantEvent{full, {Step: step}} {
			all = append(all, ocsfGrant(&api.StoredGrantEvent{Node: "node-1", Epoch: "E", Seq: 8, Received: timestamppb.New(began), Event: g}))
		}
	}
	return all
}

// TestEventsAreOfTheSchema: what the classes require is there, and nothing that they do not have.
func TestEventsAreOfTheSchema(t *testing.T) {
	t.Parallel()
	s := readSchema(t)
	for _, v := range exported() {
		event := asEvent(t, v)
		if problems := s.check(event); len(problems) > 0 {
			t.Errorf("%v: %s", event["message"], strings.Join(problems, "; "))
		}
	}
}

// TestEventsSayWhatTheRecordSays holds some events whole.
func TestEventsSayWhatTheRecordSays(t *testing.T) {
	t.Parallel()
	const golden = "testdata/ocsf/events.jsonl"
	var b bytes.Buffer
	all := exported()
	for _, v := range append(all[:4:4], all[len(all)-44], all[len(all)-43], all[len(all)-30]) {
		line, err := encodeJSON(v)
		if err != nil {
			t.Fatal(err)
		}
		b.Write(line)
	}
	if *update {
		if err := os.WriteFile(golden, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil || !bytes.Equal(want, b.Bytes()) {
		t.Errorf("%v; have\n%s\nwant\n%s", err, b.Bytes(), want)
	}
}

// TestNothingOfARecordIsLeftOut: each field is in the event, mapped or not.
func TestNothingOfARecordIsLeftOut(t *testing.T) {
	t.Parallel()
	r := &api.FlowRecord{Event: "CLOSE", Time: timestamppb.New(began), Boot: durationpb.New(11 * time.Second), Cpu: 12, Seq: 1313, FlowId: "f14", Verdict: "BYPASSED", Reason: "PATH_OPEN",
		Protocol: "tcp", Client: "10.1.0.15:1616", Server: "10.2.0.17:1818", Service: "s19", Device: "d20", Identity: "spiffe://i21", Grant: "g22", Slot: 2323,
		BytesToServer: 2424, BytesToClient: 2525, PacketsToServer: 2626, PacketsToClient: 2727, Count: 2828, Detail: "d29",
		Proof: "p33", Application: "a34", Caller: &api.Workload{Identity: "spiffe://i35", Pod: "p36", Pid: 3737}, Request: &api.Request{Number: 3838, Path: "/p39", Status: 404}}
	text, err := json.Marshal(ocsfFlow(&api.StoredFlow{Node: "n30", Epoch: "e31", Seq: 3232, Flow: r}))
	if err != nil {
		t.Fatal(err)
	}
	fields := r.ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		if !r.ProtoReflect().Has(fields.Get(i)) {
			t.Errorf("%s is not set here", fields.Get(i).Name())
		}
	}
	for _, want := range []string{"CLOSE", fmt.Sprint(began.UnixMilli()), "11s", `"cpu":12`, "1313", "f14", "BYPASSED", "PATH_OPEN", `"tcp"`, "10.1.0.15", "1616", "10.2.0.17", "1818", "s19", "d20", "spiffe://i21", "g22", "2323",
		`"bytes_out":2424`, `"bytes_in":2525`, `"packets_out":2626`, `"packets_in":2727`, "2828", "d29", "n30/e31/flow/3232",
		"p33", "a34", "spiffe://i35", "p36", `"pid":3737`, `"number":3838`, "/p39", `"status":404`} {
		if !strings.Contains(string(text), want) {
			t.Errorf("%s is not in %s", want, text)
		}
	}
}
