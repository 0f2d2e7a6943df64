package main

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/pkg/grant"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

func (c *cli) grantJoin() *cobra.Command {
	var resources []string
	var out string
	cmd := &cobra.Command{
		Use:   "join FILE FILE...",
		Short: "Put together what several people approved, each on a copy of their own",
		Long: `Put the signatures of several copies of one grant together: people approve at the same time, each the file that
was asked with, and this makes one grant of what they send back. Copies that differ in anything but signatures are refused,
with what differs. With --policy each copy is verified, and it is said whose approval is still missing.`,
		Example: `  sallyport grant join backup.bob.grant backup.carol.grant --policy /etc/sallyport/resources.d --out backup.all.grant`,
		Args:    between(2, -1),
		RunE:    func(_ *cobra.Command, args []string) error { return c.join(args, resources, out) },
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringSliceVar(&resources, "policy", nil, "check against the resources in these `FILES` or this directory")
	f.StringVar(&out, "out", "", "new `FILE` for the joined grant (default: standard output)")
	return cmd
}

func (c *cli) join(files, resources []string, out string) error {
	set, err := c.resourcesAt(resources)
	if err != nil {
		return err
	}
	var joined []byte
	for i, file := range files {
		envelope, err := c.readCopy(set, file)
		if err == nil && i > 0 {
			envelope, err = grant.Join(joined, envelope)
		}
		if err != nil {
			return explained("join grants", inFile(err, file))
		}
		joined = envelope
	}
	p, err := grant.Peek(joined)
	if err != nil {
		return explained("join grants", err)
	}
	return c.writeApproved(out, resources, set, p, joined)
}

// readCopy reads an envelope and, where resources are at hand, verifies it: one bad signature would spoil the rest.
func (c *cli) readCopy(set *policy.Set, file string) ([]byte, error) {
	envelope, err := c.readEnvelope(file)
	if err == nil && set != nil {
		_, err = grant.Verify(envelope, set.Keyrings(), c.now())
	}
	return envelope, err
}

// inFile says of which file problems are.
func inFile(err error, file string) error {
	list := policy.Errors(err)
	if len(list) == 0 {
		return err
	}
	var named []error
	for _, e := range list {
		of := *e
		of.File = file
		named = append(named, &of)
	}
	return errors.Join(named...)
}
