package main

import (
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// TestPartsThatAreReady: a probe asks about one part, and problems of others do not count; the proxy counts with enforcement alone.
func TestPartsThatAreReady(t *testing.T) {
	for _, c := range []struct {
		part  string
		state *api.StatusReply
		says  string // "": ready
	}{
		{"", &api.StatusReply{}, ""},
		{"enforcement", &api.StatusReply{Ready: true, Problems: []string{"the collector is away"}}, ""},
		{"enforcement", &api.StatusReply{NotReadyWhy: "hooks are not probed yet", ProxyListening: true}, "hooks are not probed yet"},
		{"proxy", &api.StatusReply{Ready: true, ProxyListening: true}, ""},
		{"proxy", &api.StatusReply{Ready: true}, "the proxy does not listen"},
		{"proxy", &api.StatusReply{ProxyListening: true}, "does not enforce"},
		{"guard", &api.StatusReply{Ready: true, ProxyListening: true}, `there is no part "guard"`},
	} {
		err := partReady(c.state, c.part)
		if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%q of %v: %v, want %q", c.part, c.state, err, c.says)
		}
	}
}
