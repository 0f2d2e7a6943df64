package policy

import (
	"fmt"
	"path/filepath"
	"reflect"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// AgentConfig is the configuration of the agent and of the proxy of one node. Its name is the name
// of the node.
type AgentConfig struct {
	TypeMeta `yaml:",inline"`
	Metadata `json:"metadata" yaml:"metadata"`
	Spec     AgentConfigSpec `json:"spec" yaml:"spec"`
}

// AgentConfigSpec is what an AgentConfig says. Defaults stand behind each field.
type AgentConfigSpec struct {
	// TrustDomain of the node's identities, like example.org. It has no default.
	TrustDomain string `json:"trustDomain" yaml:"trustDomain"`
	// FederatesWith are other trust domains whose identities may come, as the Workload API gives their bundles: none. A service that
	// lets in identities of none of these, nor of the node's own, is not taken.
	FederatesWith []string `json:"federatesWith,omitempty" yaml:"federatesWith,omitempty"`
	// Resources is the directory of the set of resources: /etc/sallyport/resources.d.
	Resources string `json:"resources" yaml:"resources"`
	// Kubernetes takes the resources from a cluster, and from no directory. Left out: there is no cluster.
	Kubernetes *KubernetesConfig `json:"kubernetes,omitempty" yaml:"kubernetes,omitempty"`
	// PolicySignatures says whether resources that are looser than those in force need signatures: off, or required. Where it is
	// not written: off, and required with kubernetes.
	PolicySignatures string `json:"policySignatures" yaml:"policySignatures"`
	// PolicySet is the name of the ResourceSet that this node takes when it is signed, and takes no other: sets for other nodes
	// have other names. None; where signatures are required, it has to be written.
	PolicySet string `json:"policySet,omitempty" yaml:"policySet,omitempty"`
	// PolicyKeys are public keys that may sign resources whatever the keyrings say, and so the first set of a node. No keyring
	// revokes them, and nobody knows whose they are: each counts as a person, beside the person's other keys. None; where signatures
	// are required, at least one.
	PolicyKeys []PublicKey `json:"policyKeys,omitempty" yaml:"policyKeys,omitempty"`
	// Candidate is a directory of another set of resources, which is computed beside the one in force and decides nothing. Left
	// out: none.
	Candidate string `json:"candidate,omitempty" yaml:"candidate,omitempty"`
	// StateDir keeps what must outlive a reboot: /var/lib/sallyport.
	StateDir string `json:"stateDir" yaml:"stateDir"`
	// RunDir keeps sockets and what does not outlive a reboot: /run/sallyport.
	RunDir string `json:"runDir" yaml:"runDir"`
	// BPFFS is a bpffs mount: /sys/fs/bpf. Sallyport pins below <bpffs>/sallyport.
	BPFFS string `json:"bpffs" yaml:"bpffs"`
	// WorkloadAPI is the socket that gives agent and proxy their identities:
	// unix:///run/spire/sockets/agent.sock.
	WorkloadAPI string `json:"workloadAPI" yaml:"workloadAPI"`
	// Workloads is where the agent learns the identities of others' processes on this node.
	Workloads WorkloadsConfig `json:"workloads" yaml:"workloads"`
	// Devices tells the node's devices apart.
	Devices DevicesConfig `json:"devices" yaml:"devices"`
	// Hooks is how programs are held on devices: tcx (Linux 6.6 and later), clsact (5.15 and later), or
	// auto, which is tcx where the kernel has it.
	Hooks string `json:"hooks" yaml:"hooks"`
	// Cgroup is the directory of the control group (version 2) whose sockets the backstop watches. Left
	// out: the root, which is every socket of the machine; any other leaves sockets out.
	Cgroup string `json:"cgroup,omitempty" yaml:"cgroup,omitempty"`
	// PodLoopback says whether a pod may reach its own protected service without the proxy: admit, or deny.
	PodLoopback string `json:"podLoopback" yaml:"podLoopback"`
	// XDP configures the filter in front of uplinks.
	XDP XDPConfig `json:"xdp" yaml:"xdp"`
	// Lease is how long the kernel admits new bypassed flows without a sign of life from the agent:
	// 15s, from 2s to 60s.
	Lease Duration `json:"lease" yaml:"lease"`
	// Collector receives the records. Left out: they stay on the node.
	Collector *CollectorConfig `json:"collector,omitempty" yaml:"collector,omitempty"`
	// FlowBuffer is how many flow records are kept in memory while the collector is away: 65536.
	FlowBuffer uint32 `json:"flowBuffer" yaml:"flowBuffer"`
	// FlowSpool is how much of the disk, below stateDir, flow records take that the collector has not taken within seconds: 512MiB.
	// 0B: none, they are in memory alone.
	FlowSpool Size `json:"flowSpool" yaml:"flowSpool"`
	// Metrics is the address that serves Prometheus metrics. Left out: none.
	Metrics string `json:"metrics,omitempty" yaml:"metrics,omitempty"`
	// Automation lets workloads ask the agent for paths, over mTLS. Left out: none can.
	Automation *AutomationConfig `json:"automation,omitempty" yaml:"automation,omitempty"`
	// Operators may use the agent's socket.
	Operators OperatorsConfig `json:"operators" yaml:"operators"`
	// Proxy configures the identity proxy.
	Proxy ProxyConfig `json:"proxy" yaml:"proxy"`
}

// Values of AgentConfigSpec.PolicySignatures.
const (
	SignaturesOff      = "off"
	SignaturesRequired = "required"
)

// Values of AgentConfigSpec.PodLoopback.
const (
	PodLoopbackAdmit = "admit"
	PodLoopbackDeny  = "deny"
)

// Values of WorkloadsConfig.API.
const (
	WorkloadsNone      = "none"
	WorkloadsBroker    = "broker"
	WorkloadsDelegated = "delegated"
)

// WorkloadsConfig names who tells the identities of the node's workloads.
type WorkloadsConfig struct {
	// API is none, broker (the SPIFFE Broker API), or delegated (SPIRE's Delegated Identity API, by numbers of
	// processes alone): none.
	API string `json:"api" yaml:"api"`
	// Address is its socket: unix:///run/spire/broker/broker.sock. Left out with none.
	Address string `json:"address,omitempty" yaml:"address,omitempty"`
}

// DevicesConfig tells devices apart by shell patterns of their names.
type DevicesConfig struct {
	// Pods are host-side devices of pods: veth*, cali*. Every other device is an uplink.
	Pods []string `json:"pods" yaml:"pods"`
	// Ignore are devices that are never hooked. Protected services are closed to what comes by them.
	Ignore []string `json:"ignore,omitempty" yaml:"ignore,omitempty"`
}

// XDPConfig configures the filter that uplinks have in front of the hooks. It drops what no protected service
// should be bothered with; a device without one is as closed as with it.
type XDPConfig struct {
	// Mode is where the filter runs: auto, native, generic or off. auto is native on network cards whose driver takes
	// it, and off elsewhere. generic costs every packet of the device a copy.
	Mode string `json:"mode" yaml:"mode"`
	// DenySources may not send to protected services: none. It keeps a flood away where a filter is, and is no access
	// rule.
	DenySources []AddressRange `json:"denySources,omitempty" yaml:"denySources,omitempty"`
	// SYNsPerSource bounds the SYNs of one IPv4 address or IPv6 /64 to all protected services: no bound, for behind one
	// address there may be thousands of clients.
	SYNsPerSource SYNLimit `json:"synsPerSource" yaml:"synsPerSource"`
	// SYNsPerService bounds the SYNs of all sources to one protected service: no bound. A flood that reaches it costs
	// everybody.
	SYNsPerService SYNLimit `json:"synsPerService" yaml:"synsPerService"`
}

// SYNLimit is a token bucket for SYNs.
type SYNLimit struct {
	// Rate is SYNs a second; 0 is no bound.
	Rate uint32 `json:"rate" yaml:"rate"`
	// Burst is SYNs at a time: as many as Rate.
	Burst uint32 `json:"burst" yaml:"burst"`
}

// CollectorConfig says where the collector is, and who it must be.
type CollectorConfig struct {
	// Address is host:port.
	Address string `json:"address" yaml:"address"`
	// ID is the collector's SPIFFE ID: spiffe://<trustDomain>/sallyport/collector.
	ID string `json:"id" yaml:"id"`
	// LogKey is the key of its log, as its log.pub has it. Left out: the one that it shows first.
	LogKey string `json:"logKey,omitempty" yaml:"logKey,omitempty"`
	// MayRevoke says whether a grant ends on the collector's word: no. Who has taken over the collector could end them all.
	MayRevoke bool `json:"mayRevoke,omitempty" yaml:"mayRevoke,omitempty"`
}

// AutomationConfig says where workloads ask for paths, and how much one identity may ask for.
type AutomationConfig struct {
	// Listen are addresses and ports, like "[::]:9470". At least one.
	Listen []string `json:"listen" yaml:"listen"`
	// SharedAddresses stand for many hosts, as those of NAT and of load balancers do: no path is bound to one. The
	// node's own addresses and its gateways are never bound to, listed or not.
	SharedAddresses []AddressRange `json:"sharedAddresses,omitempty" yaml:"sharedAddresses,omitempty"`
	// RequestsPerMinute of one identity: 60. Twenty may come at a time.
	RequestsPerMinute uint32 `json:"requestsPerMinute,omitempty" yaml:"requestsPerMinute,omitempty"`
	// PathsPerIdentity is how many paths one identity may hold at a time: 64.
	PathsPerIdentity uint32 `json:"pathsPerIdentity,omitempty" yaml:"pathsPerIdentity,omitempty"`
}

// OperatorsConfig lists who may use the agent's socket, by what the kernel says of the caller.
type OperatorsConfig struct {
	// UIDs are user ids: root alone.
	UIDs []uint32 `json:"uids" yaml:"uids"`
	// GIDs are group ids: none.
	GIDs []uint32 `json:"gids,omitempty" yaml:"gids,omitempty"`
}

// ProxyConfig configures the identity proxy.
type ProxyConfig struct {
	// UID and GID are what it runs as: 65532. Not root.
	UID uint32 `json:"uid" yaml:"uid"`
	GID uint32 `json:"gid" yaml:"gid"`
	// ListenPort is its port in the px namespace: 15001.
	ListenPort uint16 `json:"listenPort" yaml:"listenPort"`
	// MaxConnections it serves at a time: 10000.
	MaxConnections uint32 `json:"maxConnections" yaml:"maxConnections"`
	// HandshakeTimeout is what a client has at most to prove an identity, less up to a quarter of it by chance: 5s.
	HandshakeTimeout Duration `json:"handshakeTimeout" yaml:"handshakeTimeout"`
	// IdleTimeout ends a connection on which nothing is said: 1h.
	IdleTimeout Duration `json:"idleTimeout" yaml:"idleTimeout"`
	// ExpiryGrace is how long a connection outlives the certificate that it was let in by: 30s.
	ExpiryGrace Duration `json:"expiryGrace" yaml:"expiryGrace"`
	// DialTimeout ends a dial of the service: 5s.
	DialTimeout Duration `json:"dialTimeout" yaml:"dialTimeout"`
	// DrainTimeout is how long live connections have at a stop: 10s.
	DrainTimeout Duration `json:"drainTimeout" yaml:"drainTimeout"`
	// Certificates are web certificates for clients of HTTP services that know no SPIFFE: none.
	Certificates []WebCertificate `json:"certificates,omitempty" yaml:"certificates,omitempty"`
	// LoginKeys is the file with the keys that seal browser logins, for proxies that share them. Empty: a key of its own, in
	// memory, with which logins end when the proxy does.
	LoginKeys string `json:"loginKeys,omitempty" yaml:"loginKeys,omitempty"`
	// Authz lets another proxy ask for the decisions of this one, by Envoy's ext_authz protocol. Left out: none can.
	Authz *AuthzConfig `json:"authz,omitempty" yaml:"authz,omitempty"`
}

// AuthzConfig configures `sallyport-proxy authz`. Who may ask is believed about the addresses, certificates and requests of clients.
type AuthzConfig struct {
	// Socket is the path of a Unix socket. Left out: none. The process must be able to write in its directory.
	Socket string `json:"socket,omitempty" yaml:"socket,omitempty"`
	// GID is the group that may use the socket: the proxy's own. The process must be a member of it.
	GID uint32 `json:"gid,omitempty" yaml:"gid,omitempty"`
	// Listen are addresses and ports, like "[::]:9471", of mTLS with the proxy's identity: none.
	Listen []string `json:"listen,omitempty" yaml:"listen,omitempty"`
	// Gateways are the SPIFFE IDs that may ask there. At least one with listen.
	Gateways []string `json:"gateways,omitempty" yaml:"gateways,omitempty"`
	// BelievePrincipal lets in clients of whom the other proxy tells a SPIFFE ID without a certificate that proves it: no.
	BelievePrincipal bool `json:"believePrincipal,omitempty" yaml:"believePrincipal,omitempty"`
}

// WebCertificate is a certificate that the proxy shows for HTTP services that name it. Its files are read again when they change.
type WebCertificate struct {
	// Name is what HTTPSpec.Certificate says.
	Name string `json:"name" yaml:"name"`
	// CertFile has the chain, and KeyFile the private key, in PEM. The proxy must be able to read both.
	CertFile string `json:"certFile" yaml:"certFile"`
	KeyFile  string `json:"keyFile" yaml:"keyFile"`
}

// DefaultAgentConfig is the configuration of which nothing but the trust domain and the name of the
// node is missing.
func DefaultAgentConfig() AgentConfig {
	return AgentConfig{
		TypeMeta: TypeMeta{APIVersion: APIVersion, Kind: KindAgentConfig},
		Spec: AgentConfigSpec{
			Resources: "/etc/sallyport/resources.d",
			StateDir:  "/var/lib/sallyport",

			PolicySignatures: SignaturesOff,

			RunDir:      "/run/sallyport",
			BPFFS:       "/sys/fs/bpf",
			Workloads:   WorkloadsConfig{API: WorkloadsNone},
			WorkloadAPI: "unix:///run/spire/sockets/agent.sock",
			Devices:     DevicesConfig{Pods: []string{"veth*", "cali*"}},
			Hooks:       "auto",
			PodLoopback: PodLoopbackAdmit,
			XDP:         XDPConfig{Mode: "auto"},
			Lease:       Duration{15 * time.Second},
			FlowBuffer:  65536,
			FlowSpool:   512 << 20,
			Operators:   OperatorsConfig{UIDs: []uint32{0}},
			Proxy: ProxyConfig{
				UID: 65532, GID: 65532, ListenPort: 15001, MaxConnections: 10000,
				HandshakeTimeout: Duration{5 * time.Second}, IdleTimeout: Duration{time.Hour},
				ExpiryGrace: Duration{30 * time.Second}, DialTimeout: Duration{5 * time.Second},
				DrainTimeout: Duration{10 * time.Second},
			},
		},
	}
}

// ParseAgentConfig reads an agent's configuration: one AgentConfig, alone in its file. Defaults are
// applied. name is the file name in errors. Every problem comes back at once, as errors.Join of
// *Error.
func ParseAgentConfig(name string, data []byte) (AgentConfig, error) {
	p := &problems{}
	config := DefaultAgentConfig()
	for i, d := range documents(name, data, p) {
		switch {
		case i > 0:
			d.report("", faultf("move it to the resources directory", "an AgentConfig is alone in its file"))
		case d.kind() == KindAgentConfig:
			d.decode(d.root, reflect.ValueOf(&config).Elem(), "")
			config.validate(d)
		default:
			d.report("kind", faultf("write kind: AgentConfig; resources have a directory of their own",
				"want AgentConfig, got %q", d.lookup("kind")))
		}
	}
	if config.Name == "" && len(p.list) == 0 {
		p.add(&Error{File: name, Msg: "is empty", Hint: "write an AgentConfig in it"})
	}
	if err := p.err(); err != nil {
		return AgentConfig{}, err
	}
	return config, nil
}

// For is the configuration as the named node reads it, where one file is that of many nodes. An empty name changes nothing.
func (c AgentConfig) For(node string) (AgentConfig, error) {
	if node == "" {
		return c, nil
	}
	if err := CheckNodeName(node); err != nil {
		return AgentConfig{}, fmt.Errorf("--node: %w", err)
	}
	c.Name = node
	return c, nil
}

// AgentSocket is the path of the operators' socket.
func (c AgentConfig) AgentSocket() string { return filepath.Join(c.Spec.RunDir, "agent.sock") }

// ProxySocket is the path of the socket that takes the proxy's records.
func (c AgentConfig) ProxySocket() string { return filepath.Join(c.Spec.RunDir, "proxy.sock") }

// PxPath is the path of the px namespace file.
func (c AgentConfig) PxPath() string { return filepath.Join(c.Spec.RunDir, "px") }

// PolicyFile is the path of the agent's last verified resources, which the proxy reads.
func (c AgentConfig) PolicyFile() string { return filepath.Join(c.Spec.RunDir, "policy.yaml") }

// SignalsFile is the path of what was said about callers, which the proxy reads.
func (c AgentConfig) SignalsFile() string { return filepath.Join(c.Spec.RunDir, SignalsFile) }

// LockFile is the path of the file that one agent holds locked.
func (c AgentConfig) LockFile() string { return filepath.Join(c.Spec.RunDir, "agent.pid") }

// GuardFile is the path of the file that every guard holds locked, for the agent to see.
func (c AgentConfig) GuardFile() string { return filepath.Join(c.Spec.RunDir, "guard.lock") }

// PinDir is the directory below which Sallyport pins.
func (c AgentConfig) PinDir() string { return filepath.Join(c.Spec.BPFFS, "sallyport") }

// AgentID is the agent's SPIFFE ID. The configuration must have passed ParseAgentConfig.
func (c AgentConfig) AgentID() spiffeid.ID { return c.id("agent", c.Name) }

// ProxyID is the proxy's SPIFFE ID. The configuration must have passed ParseAgentConfig.
func (c AgentConfig) ProxyID() spiffeid.ID { return c.id("proxy", c.Name) }

// CollectorID is the SPIFFE ID that the collector must have. The configuration must have passed
// ParseAgentConfig.
func (c AgentConfig) CollectorID() spiffeid.ID {
	if c.Spec.Collector != nil {
		return spiffeid.RequireFromString(c.Spec.Collector.ID)
	}
	return c.id("collector")
}

func (c AgentConfig) id(segments ...string) spiffeid.ID {
	td := spiffeid.RequireTrustDomainFromString(c.Spec.TrustDomain)
	return spiffeid.RequireFromSegments(td, append([]string{"sallyport"}, segments...)...)
}
