// Package rules states which package may import what, and why, and holds the module to it.
package rules

// module is the path before every package of ours.
const module = "github.com/sallyport-dev/sallyport/"

// rule keeps an import to some packages. Patterns are import paths relative to the module where they
// begin with ./, and a pattern that ends in /... stands for everything at and below it.
type rule struct {
	imports []string // what the rule is about
	only    []string // who may import it; empty with except means nobody of these
	not     []string // who may not; empty means everybody outside only
	why     string
}

// rules bind everything but tests.
var rules = []rule{
	{
		imports: []string{"./bpf"},
		only:    []string{"./pkg/datapath"},
		why:     "only datapath turns the kernel's bytes into values: a change of layout is a change in one package",
	},
	{
		imports: []string{"github.com/cilium/ebpf/..."},
		only:    []string{"./bpf", "./pkg/datapath", "./tools/...", "./test/..."},
		why:     "programs, maps and links have one owner, or nobody knows what is attached",
	},
	{
		imports: []string{"github.com/vishvananda/netlink/...", "github.com/vishvananda/netns"},
		only:    []string{"./pkg/px", "./pkg/datapath", "./pkg/agent", "./pkg/inventory", "./cmd/...", "./test/..."},
		why:     "the host's devices, rules and routes are touched in few places, so that it can be said what we change",
	},
	{
		imports: []string{"./pkg/api", "google.golang.org/protobuf/..."},
		only:    []string{"./pkg/api", "./pkg/audit", "./pkg/collector", "./pkg/console", "./pkg/agent", "./pkg/proxy", "./pkg/client", "./pkg/proof", "./pkg/identity/...", "./pkg/devauthority", "./pkg/extauthz", "./cmd/...", "./test/evidence"},
		why:     "the wire's types stay at the wire; all others speak in flow, policy and grant (proof reads sealed bytes, without the types)",
	},
	{
		imports: []string{"google.golang.org/grpc/..."},
		only:    []string{"./pkg/api", "./pkg/audit", "./pkg/collector", "./pkg/console", "./pkg/agent", "./pkg/proxy", "./pkg/client", "./pkg/identity/...", "./pkg/devauthority", "./pkg/extauthz", "./cmd/..."},
		why:     "a package that does not speak to another process does not need the means to",
	},
	{
		imports: []string{"github.com/spiffe/go-spiffe/v2/workloadapi", "github.com/spiffe/go-spiffe/v2/proto/...", "github.com/spiffe/go-spiffe/v2/exp/...", "./pkg/identity/delegated"},
		only:    []string{"./pkg/identity", "./pkg/devauthority"},
		why:     "whether an identity is fresh is judged in one place",
	},
	{
		imports: []string{"github.com/spiffe/go-spiffe/v2/svid/...", "github.com/spiffe/go-spiffe/v2/bundle/...", "github.com/spiffe/go-spiffe/v2/spiffetls/...", "github.com/spiffe/go-spiffe/v2/spiffegrpc/..."},
		only:    []string{"./pkg/identity", "./pkg/devauthority", "./pkg/proxy", "./pkg/audit", "./pkg/agent", "./pkg/collector", "./pkg/client", "./pkg/token", "./pkg/extauthz", "./cmd/..."},
		why:     "identities are proven at the edges; the rest handles their names",
	},
	{
		imports: []string{"github.com/coreos/go-oidc/..."},
		only:    []string{"./pkg/token", "./pkg/login", "./pkg/userlogin"},
		why:     "what a token proves is judged in one place; userlogin looks at its own ID tokens",
	},
	{
		imports: []string{"./pkg/agent", "./pkg/api", "./pkg/proxy", "./pkg/identity"},
		not:     []string{"./pkg/token"},
		why:     "tokens are judged by policy, bundles and keys that are given; where these come from is the proxy's business",
	},
	{
		imports: []string{"github.com/spiffe/go-spiffe/v2/spiffeid"},
		not:     []string{"./pkg/datapath", "./pkg/flow", "./pkg/grant", "./pkg/px", "./pkg/store"},
		why:     "what these packages know of an identity is a line of text",
	},
	{
		imports: []string{"modernc.org/sqlite/...", "database/sql"},
		only:    []string{"./pkg/store", "./pkg/collector"},
		why:     "what has to survive a crash is written by two packages that are tested for it",
	},
	{
		imports: []string{"github.com/jackc/pgx/..."},
		only:    []string{"./pkg/collector"},
		why:     "a node needs no database server: the collector alone may have one",
	},
	{
		imports: []string{"github.com/spf13/cobra", "flag"},
		only:    []string{"./cmd/...", "./tools/...", "./test/bench"},
		why:     "packages take a Config; only commands read flags",
	},
	{
		imports: []string{"github.com/prometheus/..."},
		only:    []string{"./pkg/agent", "./pkg/collector", "./cmd/..."},
		why:     "metrics are shown by the processes that serve them",
	},
	{
		imports: []string{"./pkg/api", "./pkg/flow", "./pkg/policy"},
		not:     []string{"./pkg/store"},
		why:     "the store keeps bytes in order; what they mean can change without it",
	},
	{
		imports: []string{"net/http", "os/exec", "os/signal", "log/slog", "syscall", "golang.org/x/sys/...", "./bpf", "./pkg/datapath", "./pkg/px", "./pkg/identity", "./pkg/proxy", "./pkg/store", "./pkg/audit", "./pkg/collector", "./pkg/api", "./pkg/client", "./pkg/agent"},
		not:     []string{"./pkg/flow", "./pkg/policy", "./pkg/grant", "./pkg/signal", "./pkg/rollout", "./pkg/proof"},
		why:     "pure packages decide on values alone, so that agent, proxy and CLI come to the same answer",
	},
	{
		imports: []string{"net"},
		not:     []string{"./pkg/flow", "./pkg/grant"},
		why:     "net/netip is enough for addresses; policy alone takes host names apart",
	},
	{
		imports: []string{"./pkg/login"},
		only:    []string{"./pkg/proxy", "./cmd/sallyport-proxy"},
		why:     "browsers log in at the proxy and nowhere else",
	},
	{
		imports: []string{"github.com/envoyproxy/go-control-plane/..."},
		only:    []string{"./pkg/extauthz"},
		why:     "what another proxy asks is read in one place, and judged where our own proxy's requests are",
	},
	{
		imports: []string{"./pkg/extauthz"},
		only:    []string{"./cmd/sallyport-proxy"},
		why:     "it is another way to ask the proxy, and nothing else answers",
	},
	{
		imports: []string{"./pkg/userlogin"},
		only:    []string{"./cmd/sallyport"},
		why:     "a person's tokens are kept by that person's command, and by nothing that runs on a node",
	},
	{
		imports: []string{"golang.org/x/oauth2/..."},
		only:    []string{"./pkg/login", "./pkg/userlogin"},
		why:     "codes are redeemed where it is checked who began: by the proxy for browsers, by the command for its user",
	},
	{
		imports: []string{"github.com/crewjam/saml/...", "github.com/russellhaering/goxmldsig/...", "github.com/beevik/etree/..."},
		only:    []string{"./tools/samlbridge"},
		why:     "signatures of XML are where logins are forged: a program of its own reads them, the proxy its short tokens",
	},
	{
		imports: []string{"k8s.io/..."},
		only:    []string{"./pkg/kube/...", "./tools/...", "./test/schema"},
		why:     "what an API server says is read in one place, and turned into what policy and grant read from files",
	},
	{
		imports: []string{"./pkg/kube"},
		only:    []string{"./pkg/agent"},
		why:     "the agent alone follows a cluster; nothing else depends on there being one",
	},
	{
		imports: []string{"./pkg/build"},
		only:    []string{"./cmd/...", "./tools/package"},
		why:     "what a program was built from is told by the program; packages take a version as text",
	},
	{
		imports: []string{"github.com/spdx/..."},
		only:    []string{"./tools/package"},
		why:     "what is in a release is written down when it is made",
	},
	{
		imports: []string{"./pkg/inventory"},
		only:    []string{"./cmd/sallyport"},
		why:     "what processes say of themselves is for people who are about to write policy, and decides nothing",
	},
	{
		imports: []string{"./pkg/console"},
		only:    []string{"./pkg/collector", "./cmd/sallyport"},
		why:     "pages are shown by who serves the log and by the operator's command, and nothing is decided in them",
	},
	{
		imports: []string{"./pkg/agent"},
		only:    []string{"./cmd/sallyport-agent"},
		why:     "the reconciler ties everything together and nothing hangs on it",
	},
	{
		imports: []string{"./pkg/devauthority"},
		only:    []string{"./cmd/sallyport"},
		why:     "a certificate authority for demonstrations must not be within reach of the agent or the proxy",
	},
	{
		imports: []string{"./pkg/policy", "./pkg/datapath", "./pkg/grant"},
		not:     []string{"./pkg/identity", "./pkg/px"},
		why:     "who a peer is does not depend on what it may do",
	},
	{
		imports: []string{"./test/...", "testing"},
		only:    []string{"./test/..."},
		why:     "nothing that is shipped depends on what tests need",
	},
	{
		imports: []string{"k8s.io/apiextensions-apiserver/...", "sigs.k8s.io/controller-tools/..."},
		only:    []string{"./tools/crdgen", "./test/schema"},
		why:     "definitions of resources are generated and tested with them; the agent validates by policy alone",
	},
	{
		imports: []string{"./tools/..."},
		only:    []string{},
		why:     "tools are run, not imported",
	},
}

// homeless are package names that say nothing about what is inside.
var homeless = []string{"util", "utils", "common", "helper", "helpers", "types", "models", "constants", "misc", "shared", "base"}
