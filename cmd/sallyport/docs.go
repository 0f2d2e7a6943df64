package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// docs is for packagers: it writes what a distribution installs next to the program.
func (c *cli) docs() *cobra.Command {
	return &cobra.Command{
		Use:     "docs DIR",
		Short:   "Write man pages to DIR/man and shell completions to DIR/completions",
		Example: `  sallyport docs out`,
		Hidden:  true,
		Args:    exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := writeMan(cmd.Root(), filepath.Join(args[0], "man")); err != nil {
				return fmt.Errorf("write man pages: %w", err)
			}
			if err := writeCompletions(cmd.Root(), filepath.Join(args[0], "completions")); err != nil {
				return fmt.Errorf("write completions: %w", err)
			}
			return nil
		},
	}
}

func writeMan(root *cobra.Command, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	root.DisableAutoGenTag = true // reproducible: the date is SOURCE_DATE_EPOCH's where that is set
	return doc.GenManTree(root, &doc.GenManHeader{Section: "1", Source: "Sallyport", Manual: "Sallyport"}, dir)
}

func writeCompletions(root *cobra.Command, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := root.GenBashCompletionFileV2(filepath.Join(dir, "sallyport.bash"), true); err != nil {
		return err
	}
	if err := root.GenZshCompletionFile(filepath.Join(dir, "_sallyport")); err != nil {
		return err
	}
	return root.GenFishCompletionFile(filepath.Join(dir, "sallyport.fish"), true)
}
