// Command sallyport-collector receives the records of nodes, keeps them, and answers questions about
// them.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/build"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

const defaultConfig = "/etc/sallyport/collector.yaml"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	p := process{stdout: os.Stdout, stderr: os.Stderr, notifySocket: os.Getenv("NOTIFY_SOCKET")}
	if err := p.execute(ctx, os.Args[1:]); err != nil {
		p.report(err)
		os.Exit(1)
	}
}

// process is what the command has of its surroundings.
type process struct {
	stdout, stderr io.Writer
	notifySocket   string

	config   string
	level    slog.Level
	override override
}

func (p *process) execute(ctx context.Context, args []string) error {
	cmd := p.command()
	cmd.SetArgs(args)
	return cmd.ExecuteContext(ctx)
}

func (p *process) command() *cobra.Command {
	root := &cobra.Command{
		Use:           "sallyport-collector",
		Short:         "Receive, keep and show flow records and grant events",
		Long:          "Receive the records of nodes over SPIFFE mTLS, keep each exactly once, and answer questions about them.\nIt runs until it is stopped; what was acknowledged to a node is durable.",
		Args:          cobra.NoArgs,
		Version:       build.Version(),
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE:          func(cmd *cobra.Command, _ []string) error { return p.serve(cmd.Context()) },
	}
	root.SetOut(p.stdout)
	root.SetErr(p.stderr)
	root.SetVersionTemplate(build.Read().Describe(root.Name()))
	flags := root.PersistentFlags()
	flags.StringVar(&p.config, "config", defaultConfig, "configuration `FILE` (kind: CollectorConfig)")
	flags.TextVar(&p.level, "log-level", p.level, "least `LEVEL` to log: DEBUG, INFO, WARN or ERROR")
	flags.StringVar(&p.override.listen, "listen", "", "`ADDRESS` for nodes and remote readers, in place of the configured one")
	flags.StringVar(&p.override.socket, "socket", "", "`PATH` of the Unix socket for local readers, in place of the configured one")
	flags.StringVar(&p.override.dataDir, "data-dir", "", "`DIR` of the records, in place of the configured one")
	root.AddCommand(p.check())
	return root
}

func (p *process) check() *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Read the configuration, and the files that it names, and change nothing",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			c, err := p.read()
			if err == nil {
				_, err = c.Spec.Postgres.address()
				err = errors.Join(err, c.Spec.Console.pair())
			}
			if err == nil {
				_, err = fmt.Fprintln(p.stdout, "ok")
			}
			return err
		},
	}
}

func (p *process) read() (config, error) {
	data, err := os.ReadFile(p.config)
	if err != nil {
		return config{}, &policy.Error{Msg: "read configuration: " + err.Error(), Hint: "name the file with --config", Err: err}
	}
	c, err := parseConfig(p.config, data)
	if err != nil {
		return config{}, err
	}
	p.override.apply(&c)
	return c, nil
}

// report prints every problem on a line of its own, each followed by its next step.
func (p *process) report(err error) {
	for _, e := range policy.Errors(err) {
		fmt.Fprintln(p.stderr, "error: "+e.Error())
		if e.Hint != "" {
			fmt.Fprintln(p.stderr, "hint: "+e.Hint)
		}
	}
}
