package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/spf13/cobra"
)

func (c *cli) uninstall() *cobra.Command {
	var config string
	var yes bool
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Take Sallyport off this node: every program, link, pin and device of ours",
		Long: `Take Sallyport off this node. From then on its protected services can be reached without the
proxy. The agent's program next to this one does it, records it, and proves that nothing is
left attached.`,
		Example: `  sudo sallyport uninstall --config /etc/sallyport/agent.yaml`,
		Args:    exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !yes {
				if err := c.confirm(cmd.Context(), "remove all enforcement from this node?"); err != nil {
					return err
				}
			}
			return c.runUninstall(cmd, config)
		},
	}
	cmd.Flags().StringVar(&config, "config", "/etc/sallyport/agent.yaml", "the agent's configuration `FILE`")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

// runUninstall runs the agent's own uninstall, so that what was made and what is removed are
// known in one place.
func (c *cli) runUninstall(cmd *cobra.Command, config string) error {
	self, err := c.executable()
	if err != nil {
		return fmt.Errorf("find own program: %w", err)
	}
	agent := filepath.Join(filepath.Dir(self), "sallyport-agent")
	child := exec.CommandContext(cmd.Context(), agent, "uninstall", "--config", config)
	child.Cancel = func() error { return child.Process.Signal(os.Interrupt) }
	child.Stdin, child.Stdout, child.Stderr = c.stdin, c.stdout, c.stderr
	err = child.Run()
	if errors.Is(err, fs.ErrNotExist) {
		return withHint(fmt.Errorf("uninstall: %w", err), "`sallyport-agent` belongs next to `sallyport`; install both, or run the agent's own `uninstall`")
	}
	if err != nil {
		return withHint(fmt.Errorf("uninstall: sallyport-agent: %w", err), "what it said is above; it may be run again")
	}
	return nil
}
