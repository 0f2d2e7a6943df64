package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/devauthority"
)

// demoLimit ends a demo that hangs.
const demoLimit = 2 * time.Minute

// demoStep is one chapter of the story: what was tried, and what was seen.
type demoStep struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
}

// demoFigures are measured, each by the step that sees it.
type demoFigures struct {
	// DeadlineToResetUs is from the path's deadline to the client's ECONNRESET, in microseconds.
	DeadlineToResetUs int64 `json:"deadline_to_reset_us"`
	// ResetToProxiedUs is from there to the first answer through the proxy.
	ResetToProxiedUs int64 `json:"reset_to_proxied_us"`
	// BytesKernel and BytesLog are the IP bytes of the grant's flows, both directions: in the path's
	// counters, and in the collector's records.
	BytesKernel uint64 `json:"bytes_kernel"`
	BytesLog    uint64 `json:"bytes_log"`
	// LatePackets are packets of the bypassed flow that the service received with a kernel time stamp
	// after the deadline.
	LatePackets int `json:"late_packets"`
}

type demoReport struct {
	Steps   []demoStep  `json:"steps"`
	Figures demoFigures `json:"figures"`
}

func (r *demoReport) failed() bool {
	for _, s := range r.Steps {
		if !s.OK {
			return true
		}
	}
	return len(r.Steps) == 0
}

func (c *cli) demo() *cobra.Command {
	var keep bool
	provider := demoEmbedded
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show the main job on this machine, in network namespaces of its own",
		Long: `Run the real agent, proxy and collector in network namespaces made for the occasion, with an
embedded SPIFFE authority in SPIRE's place, and tell what happens: a plain client is refused, a
client with an identity is served through the proxy, a signed grant lets the plain client go
around it for five seconds, the agent is killed, and the kernel ends the path on time.
With --identity spire a real spire-server and spire-agent issue the identities: the variable SPIRE_BIN_DIR
names the folder of both.
It needs root, and removes everything it made, also on Ctrl-C.`,
		Example: `  sudo bin/sallyport demo
  sudo bin/sallyport demo -o json
  sudo SPIRE_BIN_DIR=/opt/spire/bin bin/sallyport demo --identity spire`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error { return c.runDemo(cmd.Context(), provider, keep) },
	}
	cmd.Flags().Var(&provider, "identity", "who issues the identities: `embedded` or spire")
	cmd.Flags().BoolVar(&keep, "keep-logs", false, "keep what the processes wrote")
	return cmd
}

func (c *cli) runDemo(ctx context.Context, provider demoProvider, keep bool) (err error) {
	if provider == demoSPIRE {
		if err := devauthority.CheckSPIRE(c.getenv(devauthority.SPIREVariable)); err != nil {
			return withHint(fmt.Errorf("run demo: %w", err), devauthority.SPIREHint)
		}
	}
	if os.Geteuid() != 0 {
		return withHint(errors.New("run demo: needs root: it makes network namespaces and loads BPF programs"), "run it with sudo")
	}
	ctx, cancel := context.WithTimeout(ctx, demoLimit)
	defer cancel()
	w, err := c.newDemoWorld(ctx, provider, keep)
	if err != nil {
		return withHint(fmt.Errorf("set up demo: %w", err), "it wants Linux 6.6 or later with BTF, and the four binaries in one folder (`make build`)")
	}
	story := &demoStory{w: w, say: c.demoProgress()}
	report := story.tell(ctx)
	if err := w.close(); err != nil {
		report.Steps = append(report.Steps, demoStep{"everything is removed", false, err.Error()})
	}
	if err := c.showDemo(report); err != nil {
		return err
	}
	if report.failed() {
		w.showLogs(c.stderr)
		return withHint(errors.New("demo: a step failed"), "what the processes wrote is above; --keep-logs keeps it")
	}
	return nil
}

// demoProgress tells each step as it happens; for machines the report alone is written.
func (c *cli) demoProgress() func(demoStep) {
	if c.output != formatTable {
		return func(s demoStep) { c.demoLine(c.stderr, s) }
	}
	return func(s demoStep) { c.demoLine(c.stdout, s) }
}

func (c *cli) demoLine(w io.Writer, s demoStep) {
	mark := "ok  "
	if !s.OK {
		mark = "FAIL"
	}
	fmt.Fprintf(w, "%s  %s\n      %s\n", mark, escape(s.Name), escape(s.Detail))
}

func (c *cli) showDemo(r *demoReport) error {
	return c.show(r, func(t *table) {
		f := r.Figures
		t.line("")
		t.row("deadline to reset", fmt.Sprintf("%d µs", f.DeadlineToResetUs))
		t.row("reset to answer through the proxy", fmt.Sprintf("%d µs", f.ResetToProxiedUs))
		t.row("bytes: kernel, log", fmt.Sprintf("%d, %d", f.BytesKernel, f.BytesLog))
		t.row("packets past the deadline", f.LatePackets)
	})
}
