package policy

import (
	"cmp"
	"fmt"
	"net/netip"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/mod/sumdb/note"
)

// Bounds of what an AgentConfig may say.
const (
	minLease       = 2 * time.Second
	maxDenied      = 32768
	maxSYNs        = 1000000
	maxLease       = 60 * time.Second
	maxFlowBuffer  = 1 << 24
	minFlowSpool   = 1 << 20
	maxFlowSpool   = 1 << 40
	maxConnections = 1 << 20
	maxRequests    = 1000000
	maxHeld        = 65536
	maxTimeout     = 10 * time.Minute
	maxIdle        = 7 * 24 * time.Hour
	maxGrace       = 24 * time.Hour
)

func (c *AgentConfig) validate(d *document) {
	d.report("metadata.name", CheckNodeName(c.Name))
	d.report("spec.trustDomain", checkTrustDomain(c.Spec.TrustDomain))
	for i, td := range c.Spec.FederatesWith {
		d.report(fmt.Sprintf("spec.federatesWith[%d]", i), checkTrustDomain(td))
	}
	d.report("spec.resources", checkPath(c.Spec.Resources))
	d.report("spec.stateDir", checkPath(c.Spec.StateDir))
	d.report("spec.runDir", checkPath(c.Spec.RunDir))
	d.report("spec.bpffs", checkPath(c.Spec.BPFFS))
	d.report("spec.workloadAPI", checkSocket(c.Spec.WorkloadAPI))
	c.Spec.Workloads.validate(d)
	d.report("spec.hooks", checkHooks(c.Spec.Hooks))
	if c.Spec.Cgroup != "" {
		d.report("spec.cgroup", checkPath(c.Spec.Cgroup))
	}
	d.report("spec.podLoopback", checkPodLoopback(c.Spec.PodLoopback))
	d.report("spec.lease", checkRange(c.Spec.Lease, minLease, maxLease))
	d.report("spec.flowBuffer", checkCount(c.Spec.FlowBuffer, maxFlowBuffer))
	d.report("spec.flowSpool", checkSpool(c.Spec.FlowSpool))
	if c.Spec.Metrics != "" {
		d.report("spec.metrics", checkListenAddress(c.Spec.Metrics))
	}
	if c.Spec.Candidate != "" {
		d.report("spec.candidate", checkPath(c.Spec.Candidate))
		if c.Spec.Candidate == c.Spec.Resources {
			d.report("spec.candidate", faultf("name another directory", "is that of the resources in force"))
		}
	}
	c.Spec.Kubernetes.validate(d)
	c.validateSignatures(d)
	c.validateDevices(d)
	c.validateCollector(d)
	c.Spec.Automation.validate(d)
	c.Spec.XDP.validate(d)
	c.Spec.Proxy.validate(d)
}

func (w WorkloadsConfig) validate(d *document) {
	switch w.API {
	case WorkloadsNone:
		if w.Address != "" {
			d.report("spec.workloads.address", faultf("write api: broker or api: delegated, or leave the address out", "is of no use with api: none"))
		}
	case WorkloadsBroker, WorkloadsDelegated:
		d.report("spec.workloads.address", checkSocket(w.Address))
	default:
		d.report("spec.workloads.api", faultf("write none, broker or delegated", "%q is not a way to learn workloads' identities", w.API))
	}
}

func (c *AgentConfig) validateSignatures(d *document) {
	if _, written := d.lines["spec.policySignatures"]; !written && c.Spec.Kubernetes != nil {
		c.Spec.PolicySignatures = SignaturesRequired
	}
	switch c.Spec.PolicySignatures {
	case SignaturesOff:
	case SignaturesRequired:
		if c.Spec.PolicySet == "" {
			d.report("spec.policySet", faultf("write the name of the ResourceSet that is signed for this node", "is missing, and policySignatures is required"))
		}
		if len(c.Spec.PolicyKeys) == 0 {
			d.report("spec.policyKeys", faultf("list the public keys that may sign the first resources of the node", "is empty, and policySignatures is required"))
		}
	default:
		d.report("spec.policySignatures", faultf("write off or required", "%q says not whether resources need signatures", c.Spec.PolicySignatures))
	}
	if c.Spec.PolicySet != "" {
		d.report("spec.policySet", CheckName(c.Spec.PolicySet))
	}
	for i, k := range c.Spec.PolicyKeys {
		if k.IsZero() {
			d.report(fmt.Sprintf("spec.policyKeys[%d]", i), faultf(publicKeyHint, "is missing"))
		}
	}
}

func (x *XDPConfig) validate(d *document) {
	if !slices.Contains([]string{"auto", "native", "generic", "off"}, x.Mode) {
		d.report("spec.xdp.mode", faultf("write auto, native, generic or off", "%q is not a mode", x.Mode))
	}
	if len(x.DenySources) > maxDenied {
		d.report("spec.xdp.denySources", faultf("join neighbours to larger prefixes", "%d prefixes are more than %d", len(x.DenySources), maxDenied))
	}
	for i, r := range x.DenySources {
		if r.IsValid() && r.Bits() == 0 {
			d.report(fmt.Sprintf("spec.xdp.denySources[%d]", i), faultf("name smaller prefixes", "%s is everybody", r))
		}
	}
	x.SYNsPerSource.validate(d, "spec.xdp.synsPerSource")
	x.SYNsPerService.validate(d, "spec.xdp.synsPerService")
}

func (l *SYNLimit) validate(d *document, field string) {
	if l.Rate > maxSYNs {
		d.report(field+".rate", checkCount(l.Rate, maxSYNs))
	}
	if l.Burst > maxSYNs {
		d.report(field+".burst", checkCount(l.Burst, maxSYNs))
	}
	if l.Rate == 0 && l.Burst != 0 {
		d.report(field+".burst", faultf("give a rate too", "a burst without a rate bounds nothing"))
	}
	if l.Burst == 0 {
		l.Burst = l.Rate
	}
}

func (c *AgentConfig) validateDevices(d *document) {
	for i, p := range c.Spec.Devices.Pods {
		d.report(fmt.Sprintf("spec.devices.pods[%d]", i), checkDevicePattern(p))
	}
	for i, p := range c.Spec.Devices.Ignore {
		d.report(fmt.Sprintf("spec.devices.ignore[%d]", i), checkIgnored(p))
	}
}

func (c *AgentConfig) validateCollector(d *document) {
	if c.Spec.Collector == nil {
		return
	}
	d.report("spec.collector.address", checkDialAddress(c.Spec.Collector.Address))
	if c.Spec.Collector.ID == "" {
		c.Spec.Collector.ID = "spiffe://" + c.Spec.TrustDomain + "/sallyport/collector"
	}
	d.report("spec.collector.logKey", checkLogKey(c.Spec.Collector.LogKey))
	if d.isWrong("spec.trustDomain") {
		return
	}
	id, err := spiffeid.FromString(c.Spec.Collector.ID)
	if err != nil || id.Path() == "" {
		d.report("spec.collector.id", faultf("write it like spiffe://example.org/sallyport/collector",
			"%q is not a SPIFFE ID of a workload", c.Spec.Collector.ID))
	}
}

func checkLogKey(s string) error {
	if s == "" {
		return nil
	}
	if _, err := note.NewVerifier(s); err != nil {
		return faultf("write the line of log.pub in the collector's directory, or leave logKey out", "%q is no key of a log: %v", s, err)
	}
	return nil
}

func (a *AutomationConfig) validate(d *document) {
	if a == nil {
		return
	}
	d.checkList("spec.automation.listen", a.Listen, "write where the agent listens, like \"[::]:9470\", or leave automation out")
	for i, address := range a.Listen {
		d.report(fmt.Sprintf("spec.automation.listen[%d]", i), checkListenAddress(address))
	}
	a.RequestsPerMinute = cmp.Or(a.RequestsPerMinute, 60)
	d.report("spec.automation.requestsPerMinute", checkCount(a.RequestsPerMinute, maxRequests))
	a.PathsPerIdentity = cmp.Or(a.PathsPerIdentity, 64)
	d.report("spec.automation.pathsPerIdentity", checkCount(a.PathsPerIdentity, maxHeld))
}

func (p *ProxyConfig) validate(d *document) {
	if p.UID == 0 {
		d.report("spec.proxy.uid", faultf("name an unprivileged user id, like 65532", "the proxy does not run as root"))
	}
	if p.GID == 0 {
		d.report("spec.proxy.gid", faultf("name an unprivileged group id, like 65532", "the proxy does not run in root's group"))
	}
	if p.ListenPort == 0 {
		d.report("spec.proxy.listenPort", faultf("write a port from 1 to 65535", "0 is not a port"))
	}
	d.report("spec.proxy.maxConnections", checkCount(p.MaxConnections, maxConnections))
	d.report("spec.proxy.handshakeTimeout", checkRange(p.HandshakeTimeout, 100*time.Millisecond, maxTimeout))
	d.report("spec.proxy.dialTimeout", checkRange(p.DialTimeout, 100*time.Millisecond, maxTimeout))
	d.report("spec.proxy.idleTimeout", checkRange(p.IdleTimeout, time.Second, maxIdle))
	d.report("spec.proxy.expiryGrace", checkRange(p.ExpiryGrace, 0, maxGrace))
	d.report("spec.proxy.drainTimeout", checkRange(p.DrainTimeout, 0, maxTimeout))
	if p.LoginKeys != "" {
		d.report("spec.proxy.loginKeys", checkPath(p.LoginKeys))
	}
	p.Authz.validate(d, p.GID)
	seen := map[string]int{}
	for i, c := range p.Certificates {
		field := fmt.Sprintf("spec.proxy.certificates[%d]", i)
		d.report(field+".name", CheckName(c.Name))
		d.report(field+".certFile", checkPath(c.CertFile))
		d.report(field+".keyFile", checkPath(c.KeyFile))
		if at, dup := first(seen, c.Name, i); dup {
			d.report(field+".name", faultf("rename one of them", "%q is already spec.proxy.certificates[%d]", c.Name, at))
		}
	}
}

func (a *AuthzConfig) validate(d *document, own uint32) {
	if a == nil {
		return
	}
	a.GID = cmp.Or(a.GID, own)
	if a.Socket == "" && len(a.Listen) == 0 {
		d.report("spec.proxy.authz", faultf("write a socket, or listen and gateways, or leave authz out", "nobody could ask there"))
	}
	if a.Socket != "" {
		d.report("spec.proxy.authz.socket", checkPath(a.Socket))
	}
	for i, address := range a.Listen {
		d.report(fmt.Sprintf("spec.proxy.authz.listen[%d]", i), checkListenAddress(address))
	}
	if (len(a.Listen) > 0) != (len(a.Gateways) > 0) {
		d.report("spec.proxy.authz.gateways", faultf("write both or none", "listen says where, and gateways who may ask there"))
	}
	for i, g := range a.Gateways {
		if id, err := spiffeid.FromString(g); err != nil || id.Path() == "" {
			d.report(fmt.Sprintf("spec.proxy.authz.gateways[%d]", i), faultf("write it like spiffe://example.org/gateway", "%q is not a SPIFFE ID of a workload", g))
		}
	}
}

func checkTrustDomain(s string) error {
	if s == "" {
		return faultf("write the trust domain of the identities, like example.org", "is missing")
	}
	td, err := spiffeid.TrustDomainFromString(s)
	if err != nil || td.Name() != s {
		return faultf("write it like example.org, without spiffe:// and path", "%q is not a trust domain", s)
	}
	return nil
}

func checkHooks(s string) error {
	if !slices.Contains([]string{"auto", "tcx", "clsact"}, s) {
		return faultf("write auto, tcx or clsact", "%q is not a way to hold programs on devices", s)
	}
	return nil
}

func checkPodLoopback(s string) error {
	if s != PodLoopbackAdmit && s != PodLoopbackDeny {
		return faultf("write admit or deny", "%q says not what a pod may do with its own service", s)
	}
	return nil
}

func checkPath(s string) error {
	if !filepath.IsAbs(s) || filepath.Clean(s) != s || s == "/" {
		return faultf("write an absolute path without . or .. or a slash at the end", "%q is not such a path", s)
	}
	return nil
}

func checkSocket(s string) error {
	file, ok := strings.CutPrefix(s, "unix://")
	if !ok || checkPath(file) != nil {
		return faultf("write it like unix:///run/spire/sockets/agent.sock", "%q is not the address of a Unix socket", s)
	}
	return nil
}

func checkRange(v Duration, least, most time.Duration) error {
	if v.Duration < least || v.Duration > most {
		return faultf("write a duration in that range", "%s is not from %s to %s", v, Duration{least}, Duration{most})
	}
	return nil
}

func checkCount(v, most uint32) error {
	if v == 0 || v > most {
		return faultf("write a number in that range", "%d is not from 1 to %d", v, most)
	}
	return nil
}

func checkSpool(v Size) error {
	if v != 0 && (v < minFlowSpool || v > maxFlowSpool) {
		return faultf("write a size in that range, or 0B", "%s is neither 0B nor from %s to %s", v, Size(minFlowSpool), Size(maxFlowSpool))
	}
	return nil
}

func checkListenAddress(s string) error {
	a, err := netip.ParseAddrPort(s)
	if err != nil || a.Port() == 0 {
		return faultf("write an IP address and a port, like 127.0.0.1:9469", "%q is not an address to listen on", s)
	}
	return nil
}

func checkDialAddress(s string) error {
	if a, err := netip.ParseAddrPort(s); err == nil && a.Port() != 0 {
		return nil
	}
	host, port, _ := strings.Cut(s, ":")
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 || !hostPattern.MatchString(host) {
		return faultf("write a host and a port, like 10.9.0.1:9443", "%q is not an address to connect to", s)
	}
	return nil
}

func checkDevicePattern(p string) error {
	if _, err := path.Match(p, ""); err != nil || p == "" {
		return faultf("write a name or a shell pattern, like veth*", "%q is not a pattern", p)
	}
	return nil
}

// checkIgnored refuses a pattern that would leave out what enforcement cannot do without.
func checkIgnored(p string) error {
	if err := checkDevicePattern(p); err != nil {
		return err
	}
	for _, needed := range []string{"lo", "px0", "px1"} {
		if match, _ := path.Match(p, needed); match {
			return faultf("write a narrower pattern", "%q matches %s, which is always hooked", p, needed)
		}
	}
	return nil
}
