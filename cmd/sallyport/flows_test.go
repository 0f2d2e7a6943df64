package main

import (
	"slices"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// A refusal tells its client flow and number: with these the record is found, and it says what was asked for.
func TestFlowsTellOfRequestsAndCallers(t *testing.T) {
	request := &api.Request{Number: 3, Method: "GET", Host: "web.example.org", Path: "/admin", Status: 403}
	for want, r := range map[string]*api.FlowRecord{
		"": {},
		"GET web.example.org/admin 403 (flow f1, request 3); path is none of /api/*": {FlowId: "f1", Request: request, Detail: "path is none of /api/*"},
		"POST / (flow f1, request 4) by access[0]: corp/*":                           {FlowId: "f1", Request: &api.Request{Number: 4, Method: "POST", Path: "/", Rule: "access[0]: corp/*"}},
		"closed; socket of pod 1-2, spiffe://example.org/app":                        {Detail: "closed", Caller: &api.Workload{Pod: "1-2", Identity: "spiffe://example.org/app"}},
		"socket of process 7, unattested: the process has ended":                     {Caller: &api.Workload{Pid: 7, Why: "the process has ended"}},
		"socket of somebody on the node, unattested: no broker was asked":            {Caller: &api.Workload{}},
	} {
		cells := flowCells(&api.StoredFlow{Flow: r})
		if got := cells[len(cells)-1]; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	if !slices.Contains(eventWords(), "request") {
		t.Errorf("--event offers %v", eventWords())
	}
}
