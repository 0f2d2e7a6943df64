# Sallyport. `make help` lists the targets; what takes more than a line lives in tools/.

PREFIX   ?= /usr/local
TOTAL    ?= 1m
COUNT    ?= 1
PACKETS  ?= 100000000
SEED     ?= 1
IMAGE    ?= sallyport
BINARIES := sallyport sallyport-agent sallyport-proxy sallyport-collector
TOOLS    := $(CURDIR)/.tools
# The race detector, but not in what SQLite's C was translated to: its memory is none of Go's, which the detector watches, and it takes five
# times as long with it.
RACE     := -race $(foreach p,sqlite/lib libc memory,-gcflags=modernc.org/$(p)=-race=false)

# Tools that are not part of the module's own graph, each at one version.
GOTESTSUM     := gotest.tools/gotestsum@v1.13.0
GOLANGCI_LINT := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
PROTOC_GRPC   := google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.2

.DEFAULT_GOAL := build
.PHONY: $(shell sed -n 's/^\([a-z0-9-]*\):.*\#\# .*/\1/p' $(firstword $(MAKEFILE_LIST)))

build: ## build the four static binaries into bin/
	CGO_ENABLED=0 go build -trimpath -o bin/ $(BINARIES:%=./cmd/%)

demo: build ## show the main job on this machine, in namespaces of its own (root); IDENTITY=spire SPIRE_BIN_DIR=folder: with a real SPIRE
	bin/sallyport demo $(if $(IDENTITY),--identity $(IDENTITY))

# PACKAGES at a time, the longest first: most of their time they wait, and the last one would otherwise do so alone.
test: ## run every test under the race detector, PACKAGES=2 at a time (root; installs what it needs from Debian)
	go run ./tools/needs test
	go build $(RACE) ./...
	go run ./tools/tests -runner $(GOTESTSUM) -- $(RACE) -p $(or $(PACKAGES),2) -timeout 40m -count $(COUNT) ./test/e2e ./pkg/agent ./pkg/datapath ./...

test-kernels: ## run the suites that depend on the kernel in Debian's 6.1, 6.12 and newest, under QEMU
	go run ./tools/needs test-kernels
	CGO_ENABLED=0 go run ./tools/kernels $(KERNELS)

soak-leaks: ## probe without an identity while everything is killed and replaced: 0 leaked (DURATION=3m, PROBES=60000000, SEED=, JSON=file)
	go run ./tools/needs test
	SOAK_DURATION=$(or $(DURATION),$(if $(PROBES),,35m)) SOAK_PROBES=$(PROBES) SOAK_SEED=$(if $(filter file,$(origin SEED)),,$(SEED)) SOAK_JSON=$(abspath $(JSON)) \
		go test -count 1 -v -timeout 0 -run '^TestSoakLeaks$$' ./test/e2e

soak-kills: ## kill -9 the store, the collector and the agent at KILLS=1000 points each: nothing lost, nothing revived, each grant event at the collector once; and SEQUENCES=200 random ones of calls, deaths and clocks
	go run ./tools/needs test
	SALLYPORT_KILLS=$(or $(KILLS),1000) go test -count 1 -v -timeout 0 -run '^TestKilled$$' ./pkg/store ./pkg/collector
	SALLYPORT_KILLS=$(or $(KILLS),1000) SALLYPORT_SEQUENCES=$(or $(SEQUENCES),200) go test -count 1 -v -timeout 0 -run '^(TestKillAgentAtRandom|TestNoSequenceOpensTooMuch)$$' ./pkg/agent

soak-away: ## have the collector away for AWAY=1h with 500 flow records a second, and the agent restart: nothing lost, memory bounded
	SALLYPORT_AWAY=$(or $(AWAY),1h) go test -count 1 -v -timeout 0 -run '^TestHourAway$$' ./pkg/audit

soak-matrix: ## have everything happen to agent, collector, their disks and the line between them, under load for FOR=1h: produced = delivered + counted lost (root)
	go run ./tools/needs test
	SALLYPORT_MATRIX=$(or $(FOR),1h) go test -count 1 -v -timeout 0 -run '^TestAuditMatrix$$' ./test/e2e

test-alerts: ## have a real Prometheus and Alertmanager see each alert come from the programs, and go (root)
	go run ./tools/needs test test-alerts
	go test -tags alerts -count 1 -v -timeout 20m -run '^TestAlerts$$' ./test/e2e

test-spire: ## have the programs live on identities of a real SPIRE, of SPIRE_BIN_DIR=folder: rotated, withdrawn, away (root; a quarter of an hour)
	go run ./tools/needs test
	go test -p 1 -tags spire -count 1 -v -timeout 40m -run '^(TestSPIRE|TestSPIREBrokers|TestDemoWithSPIRE)$$' ./cmd/sallyport ./test/e2e

test-k8s: KUBE = KUBE_BIN_DIR=$(abspath $(or $(KUBE_BIN_DIR),.tools/kube))
test-k8s: ## have a real API server and two real kubelets run our resources, our image and our chart (root; the first time builds Kubernetes' programs into KUBE_BIN_DIR=.tools/kube, a quarter of an hour)
	go run ./tools/needs test test-k8s
	$(KUBE) go run ./tools/kube
	$(KUBE) go test -p 1 -tags k8s -count 1 -v -timeout 20m -run '^(TestServer|TestCluster)$$' ./pkg/kube/v1alpha1 ./pkg/agent
	$(KUBE) go test -p 1 -tags k8s -count 1 -v -timeout 60m ./test/k8s/... ./test/scale

quick: ## run every test once without the race detector
	go test -p 1 ./...

check: ## format, vet, lint, import rules and the module file
	test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -d $$(git ls-files '*.go'); exit 1; }
	go vet ./...
	go run $(GOLANGCI_LINT) run
	go mod verify

generate: ## regenerate what is generated, with the pinned clang and protoc (installs them from Debian)
	go run ./tools/needs generate
	GOBIN=$(TOOLS) go install google.golang.org/protobuf/cmd/protoc-gen-go
	GOBIN=$(TOOLS) go install $(PROTOC_GRPC)
	PATH="$(TOOLS):$$PATH" go generate ./bpf
	PATH="$(TOOLS):$$PATH" go generate ./...
	$(MAKE) insns

fuzz: ## fuzz every target, TOTAL=1m in all
	go run ./tools/fuzz -total $(TOTAL)

insns: ## print what the verifier does for each program, and hold it to its baseline; UPDATE=1 records it (root)
	go test -count 1 -run '^TestInstructionCounts$$' -v ./pkg/datapath $(if $(UPDATE),-args -update)

prove: ## hold the programs against the reference on PACKETS=100000000 generated packets of SEED=1 (root)
	PROVE_PACKETS=$(PACKETS) PROVE_SEED=$(SEED) go test -run '^TestNothingPassesThatMustNot$$' -timeout 0 -v ./pkg/datapath

agree: ## hold policy test, explain and the kernel to one answer on CASES=1000000 random cases of SEED=1 (root)
	AGREE_CASES=$(or $(CASES),1000000) AGREE_SEED=$(SEED) go test -count 1 -run '^TestPolicyExplainAndKernelAgree$$' -timeout 0 -v ./pkg/agent

bench-datapath: build ## compare the datapath with iptables and nftables, ROUNDS=9 (1 is short); figures go to bench-out/, or where PUBLISH says
	go run ./tools/needs bench-datapath
	go run ./test/bench -rounds $(or $(ROUNDS),9) $(if $(PUBLISH),-publish $(PUBLISH))

bench-grants: ## measure how long workloads wait for paths with PATHS=10000 active, and the agent's memory then (root); PUBLISH=docs writes it down
	go run ./tools/needs test
	BENCH_PATHS=$(or $(PATHS),10000) BENCH_PUBLISH=$(abspath $(PUBLISH)) go test -count 1 -v -timeout 0 -run '^TestBenchGrants$$' ./test/e2e

bench-audit: ## measure records from the kernel to the collector's disk, 100 nodes at one collector, and questions with RECORDS=10000000 (ENGINE=sqlite, or sqlite,postgres; root); PUBLISH=docs writes it down
	go run ./tools/needs test
	BENCH_RECORDS=$(or $(RECORDS),10000000) BENCH_ENGINES=$(or $(ENGINE),sqlite) BENCH_PUBLISH=$(abspath $(PUBLISH)) go test -count 1 -v -timeout 0 -run '^TestBenchAudit$$' ./test/e2e

bench-scale: ## measure what a change and a grant take to reach NODES=1000 nodes by a real API server, what they cost it, and a collector with as many nodes (ENGINE=sqlite, or sqlite,postgres; root); PUBLISH=docs writes it down
	go run ./tools/needs test bench-scale
	KUBE_BIN_DIR=$(abspath $(or $(KUBE_BIN_DIR),.tools/kube)) go run ./tools/kube
	KUBE_BIN_DIR=$(abspath $(or $(KUBE_BIN_DIR),.tools/kube)) BENCH_NODES=$(or $(NODES),1000) BENCH_PUBLISH=$(abspath $(PUBLISH)) go test -tags k8s -count 1 -v -timeout 0 -run '^TestScale$$' ./test/scale
	BENCH_NODES=$(or $(NODES),1000) BENCH_ENGINES=$(or $(ENGINE),sqlite) BENCH_PUBLISH=$(abspath $(PUBLISH)) go test -count 1 -v -timeout 0 -run '^TestBenchFleet$$' ./test/e2e

bench-proxy: ## measure the proxy with all that belongs to it beside HAProxy, nginx and a bare forwarder in Go, and part by part, ROUNDS=7 (root); PUBLISH=docs writes it down
	go run ./tools/needs test
	BENCH_ROUNDS=$(or $(ROUNDS),7) BENCH_PUBLISH=$(abspath $(PUBLISH)) go test -count 1 -v -timeout 0 -run '^TestBenchProxy$$' ./test/e2e

bench-slow: ## measure what a good client gets beside CLIENTS=10000 slow ones and a flood of handshakes, in ROUNDS=3, and that nothing is left of them (root); PUBLISH=docs writes it down
	go run ./tools/needs test
	SLOW_CLIENTS=$(or $(CLIENTS),10000) BENCH_ROUNDS=$(or $(ROUNDS),3) BENCH_PUBLISH=$(abspath $(PUBLISH)) go test -count 1 -v -timeout 0 -run '^TestSlowClients$$' ./test/e2e

bench: ## run every benchmark, BENCHTIME=1s each
	go test -run '^$$' -bench . -benchtime $(or $(BENCHTIME),1s) ./...

image: build ## build a container image with the four binaries and nothing else
	docker build -t $(IMAGE) .

package: ## make a Debian package, an archive, their checksums and an SPDX SBOM in dist/; the same commit gives the same bytes (VERSION=)
	go run ./tools/package $(if $(VERSION),-version $(VERSION))

test-package: ## look at what the package holds; install, upgrade under load, remove and purge the package in a Debian of its own, under its systemd (root; installs what it needs)
	go run ./tools/needs test test-package
	go test -p 1 -tags package -count 1 -v -timeout 30m -run '^TestPackage' ./tools/package ./test/host

install: ## install what `make build` built, and systemd units (PREFIX, DESTDIR); needs no Go, starts nothing
	@for b in $(BINARIES); do test -f bin/$$b || { echo "bin/$$b is not built: run \`make build\` first, as yourself" >&2; exit 1; }; done
	install -D -m 0755 -t $(DESTDIR)$(PREFIX)/bin $(BINARIES:%=bin/%)
	for u in deploy/systemd/*.service; do sed 's,/usr/bin/sallyport,$(PREFIX)/bin/sallyport,' $$u | \
		install -D -m 0644 /dev/stdin $(DESTDIR)/etc/systemd/system/$${u##*/} || exit 1; done

uninstall: ## end enforcement, prove that nothing is left attached, and remove what install put there
	deploy/systemd/uninstall "$(DESTDIR)" "$(PREFIX)"

clean: ## remove what was built
	rm -rf bin dist bench-out $(TOOLS)

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  %-14s %s\n", $$1, $$2 }'
