package main

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sallyport-dev/sallyport/pkg/devauthority"
)

// demoProvider says who issues the demo's identities. It implements pflag.Value.
type demoProvider string

const (
	demoEmbedded demoProvider = "embedded" // an authority inside the demo, which attests nobody
	demoSPIRE    demoProvider = "spire"
)

// String implements pflag.Value.
func (p *demoProvider) String() string { return string(*p) }

// Set implements pflag.Value.
func (p *demoProvider) Set(s string) error {
	switch demoProvider(s) {
	case demoEmbedded, demoSPIRE:
		*p = demoProvider(s)
		return nil
	}
	return fmt.Errorf("%q issues no identities: write embedded or spire", s)
}

// Type implements pflag.Value.
func (p *demoProvider) Type() string { return "provider" }

// demoSPIREPort is of spire-server, in the node's namespace.
const demoSPIREPort = 8481

func (w *demoWorld) makeSPIRE(bin string) error {
	td, err := spiffeid.TrustDomainFromString(demoDomain)
	if err != nil {
		return err
	}
	w.spire, err = devauthority.NewSPIRE(devauthority.SPIREConfig{
		Bin: bin, Dir: w.path("spire"), Socket: w.path("workload/spire"), TrustDomain: td, Port: demoSPIREPort,
	})
	return err
}

// demoSelectors say what SPIRE knows each of demoIdentities by: its program, or its user where no other
// process has it. The client is this program itself.
func (w *demoWorld) demoSelectors() map[string]string {
	program := func(name string) string { return "unix:path:" + filepath.Join(w.bin, name) }
	return map[string]string{
		"agent": program("sallyport-agent"), "proxy": "unix:uid:65532",
		"collector": program("sallyport-collector"), "app": program("sallyport"),
	}
}

// spireKnows starts SPIRE and makes its entries.
func (s *demoStory) spireKnows(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	if _, err := s.w.spawn("spire-server", "", s.w.spire.Server()); err != nil {
		return "", err
	}
	if err := s.w.spire.Join(ctx); err != nil {
		return "", err
	}
	for name, selector := range s.w.demoSelectors() {
		id, err := spiffeid.FromString("spiffe://" + demoDomain + demoIdentities[name])
		if err != nil {
			return "", err
		}
		if err := s.w.spire.Register(ctx, name, id, time.Hour, selector); err != nil {
			return "", err
		}
	}
	if _, err := s.w.spawn("spire-agent", "", s.w.spire.Agent()); err != nil {
		return "", err
	}
	if err := s.w.spire.Ready(ctx); err != nil {
		return "", err
	}
	return fmt.Sprintf("joined by a token; %d entries, by program and user", len(s.w.demoSelectors())), nil
}
