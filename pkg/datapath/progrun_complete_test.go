package datapath_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/flow"
	"github.com/sallyport-dev/sallyport/test/lab"
)

// firstProxyReason is where the reasons of the proxy begin (bpf/reason.h).
const firstProxyReason flow.Reason = 100

// everyCase lists the cases of all test runs.
func everyCase(r *rig) []progCase {
	var out []progCase
	for _, cases := range [][]progCase{
		deviceCases(), shapeCases(), brokenCases(), fragmentCases(), misplacedCases(), unownedCases(), otherCases(), udpCases(), icmpCases(), pxErrorCases(r),
		optionCases(), newShapeCases(), configCases(), reinjectCases(), volumeCases(), tableCases(2), ringCases(), px0Cases(2),
		pxCases(r, "sp_px1_in"), pxCases(r, "sp_px_lo_in"), loopback6Cases(r), cutCases(), backstopCases(), budgetCases(), truthCases(r), ingressCases(), linkCases(), anotherCases(),
		unlistedCases(), unlistedDatagrams(),
	} {
		out = append(out, cases...)
	}
	return out
}

// TestEveryReasonHasACase fails when the kernel can give a reason, or has a program, that no case
// reaches in both families.
func TestEveryReasonHasACase(t *testing.T) {
	for _, f := range lab.Families() {
		reached, ran := map[flow.Reason]bool{}, map[string]bool{}
		for _, c := range everyCase(&rig{}) {
			if c.only != 0 && c.only != f {
				continue
			}
			for reason := range c.want.counts {
				reached[reason] = true
			}
			ran[c.packet(exampleScene(f)).program] = true
		}
		for _, c := range socketCases() {
			for reason := range c.want {
				reached[reason] = true
			}
		}
		for _, c := range undecidedCases() {
			for reason := range c.want.counts {
				reached[reason] = true
			}
		}
		for _, reason := range flow.Reasons() {
			if strings.HasPrefix(reason.String(), "XDP_") {
				continue // TestFilter has cases of its own kind
			}
			if reason != flow.ReasonNone && reason < firstProxyReason && !reached[reason] {
				t.Errorf("%v: no case reaches %s", f, reason)
			}
		}
		for _, program := range []string{"sp_dev_in", "sp_dev_out", "sp_pod_out", "sp_lo_in", "sp_px0_in", "sp_px1_in", "sp_px_lo_in", "sp_px_lo_out", "sp_cg_in"} {
			if !ran[program] && program != "sp_lo_in" && program != "sp_pod_out" { // the scene decides between these and the devices' programs
				t.Errorf("%v: no case runs %s", f, program)
			}
		}
	}
}

func exampleScene(f lab.Family) scene {
	s := scene{family: f, device: 2, towards: "sp_dev_in", from: "sp_dev_out", service: hostID,
		client: netip.MustParseAddrPort("10.1.0.2:40000"), server: netip.MustParseAddrPort("10.1.0.1:8080")}
	if f == lab.IPv6 {
		s.client, s.server = netip.MustParseAddrPort("[fd00:1::2]:40000"), netip.MustParseAddrPort("[fd00:1::1]:8080")
	}
	return s
}
