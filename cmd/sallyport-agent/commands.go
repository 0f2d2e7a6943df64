package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/agent"
	"github.com/sallyport-dev/sallyport/pkg/build"
	"github.com/sallyport-dev/sallyport/pkg/privilege"
)

const defaultConfig = "/etc/sallyport/agent.yaml"

func (p *process) command() *cobra.Command {
	root := &cobra.Command{
		Use:           "sallyport-agent",
		Short:         "Enforce on this node that protected services are reached through the proxy",
		Version:       build.Version(),
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetOut(p.stdout)
	root.SetErr(p.stderr)
	root.SetVersionTemplate(build.Read().Describe(root.Name()))
	root.PersistentFlags().StringVar(&p.config, "config", defaultConfig, "configuration `FILE` (kind: AgentConfig)")
	root.PersistentFlags().StringVar(&p.node, "node", "", "`NAME` of this node, where one configuration is that of many; default: the one in the configuration")
	root.PersistentFlags().TextVar(&p.level, "log-level", p.level, "least `LEVEL` to log: DEBUG, INFO, WARN or ERROR")
	root.AddCommand(p.run(), p.guard(), p.px(), p.check(), p.rollback(), p.uninstall())
	return root
}

func (p *process) run() *cobra.Command {
	return &cobra.Command{
		Use:   "run",
		Short: "Enforce until stopped; stopping leaves enforcement on",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return p.asRoot(privilege.Agent(), func() error { return agent.Run(cmd.Context(), p.options()) })
		},
	}
}

func (p *process) guard() *cobra.Command {
	return &cobra.Command{
		Use:   "guard",
		Short: "Hold the hooks, so that they outlive the agent, its pins and bpffs",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return p.asRoot(privilege.Guard(), func() error { return agent.Guard(cmd.Context(), p.options()) })
		},
	}
}

// px is for who may make mounts and write sysctls where run must not: the first container of a pod.
func (p *process) px() *cobra.Command {
	return &cobra.Command{
		Use:   "px",
		Short: "Make the proxy's namespace, or mend it, and leave; run does it, too, where it may",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return p.asRoot(privilege.Agent(), func() error {
				path, err := agent.MakePx(cmd.Context(), p.options())
				if err != nil {
					return err
				}
				_, err = fmt.Fprintln(p.stdout, path)
				return err
			})
		},
	}
}

func (p *process) check() *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Read configuration and resources as run would, look for what it needs on this machine, and change nothing",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if err := agent.Check(p.options()); err != nil {
				return err
			}
			_, err := fmt.Fprintln(p.stdout, "ok")
			return err
		},
	}
}

func (p *process) rollback() *cobra.Command {
	return &cobra.Command{
		Use:   "rollback",
		Short: "Give every hook the program of the version before; the agent must be stopped",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return p.asRoot(privilege.Agent(), func() error {
				hooks, err := agent.Rollback(cmd.Context(), p.options(), fmt.Sprintf("uid:%d", p.uid))
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(p.stdout, "%d hooks have the programs of the version before\n", hooks)
				return err
			})
		},
	}
}

func (p *process) uninstall() *cobra.Command {
	return &cobra.Command{
		Use:   "uninstall",
		Short: "End enforcement and take everything away but the records; the agent must be stopped",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return p.asRoot(privilege.Agent(), func() error {
				removed, err := agent.Uninstall(cmd.Context(), p.options(), fmt.Sprintf("uid:%d", p.uid))
				if err != nil {
					return err
				}
				_, err = fmt.Fprintln(p.stdout, removed.Describe())
				return err
			})
		},
	}
}
