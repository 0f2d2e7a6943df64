package main

import (
	"io"

	"github.com/spf13/cobra"
)

func (c *cli) connect() *cobra.Command {
	var flags tunnelFlags
	cmd := &cobra.Command{
		Use:   "connect [ADDRESS:PORT]",
		Short: "Carry standard input and output to a protected service, with our identity",
		Long: `Connect to a protected service inside mTLS, with the identity that the Workload API gives us, and
carry standard input and output: for ssh's ProxyCommand and friends. With --login the token of a
login proves us instead, to services that take tokens. The end of standard input ends only our
half; the command is done when both halves have ended.`,
		Example: `  ssh -o ProxyCommand='sallyport connect %h:%p' 10.2.0.2
  ssh -o ProxyCommand='sallyport connect --login default %h:%p' db.example.org`,
		Args: between(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 && flags.to != "" {
				return withHint(usagef("connect: two services are named"), "give the address once: as argument, or with --to")
			}
			if len(args) == 1 {
				flags.to = args[0]
			}
			tunnel, err := c.open(cmd.Context(), &flags)
			if err != nil {
				return err
			}
			defer tunnel.close()
			return tunnelHint(tunnel.Pipe(cmd.Context(), &stdio{c.stdin, c.stdout}), flags.login)
		},
	}
	flags.add(cmd)
	return cmd
}

// stdio is standard input and output as one end of a tunnel.
type stdio struct {
	io.Reader
	io.Writer
}

// CloseWrite ends standard output, for a reader behind a pipe to see.
func (s *stdio) CloseWrite() error { return closeIfCan(s.Writer) }

// Close ends the reader alone: standard output ends with the command, after its error has been said. ssh goes as soon as it ends,
// and takes the command along.
func (s *stdio) Close() error { return closeIfCan(s.Reader) }

func closeIfCan(v any) error {
	if c, ok := v.(io.Closer); ok {
		return c.Close()
	}
	return nil
}
