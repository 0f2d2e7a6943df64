// Command sallyport is the operator's and the workload's command.
//
// Its rules: nouns read and verbs change. What was asked for goes to standard output; errors,
// hints and notes go to standard error, in lower case and with no full stop. Nothing that came
// from a file or from the network reaches a terminal before control characters are escaped.
package main

import (
	"context"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // so that a second signal ends what does not listen to the first
	run := run
	if filepath.Base(os.Args[0]) == pluginName {
		run = runPlugin
	}
	os.Exit(report(os.Stderr, run(ctx, processEnv(), os.Args[1:])))
}
