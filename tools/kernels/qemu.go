package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

const (
	emulator = "qemu-system-x86_64"
	// memory holds the root file system twice: as the loader's and as the guest's.
	memory = "3072"
	// bootTime is what a guest may take on top of its suite's limit.
	bootTime = 2 * time.Minute
)

// boot runs the suite in the kernel. What goes wrong on the way is in the report.
func (b build) boot(ctx context.Context, o options, t tree, mods []module) report {
	initrd, console, result := filepath.Join(b.work, "initrd"), filepath.Join(b.work, "console"), filepath.Join(b.work, "result")
	if err := b.writeInitrd(initrd, plan{Dir: b.suite.pkg, Args: b.suite.args(o)}, mods); err != nil {
		return report{Error: err.Error()}
	}
	defer os.Remove(initrd)
	ctx, cancel := context.WithTimeout(ctx, b.suite.limit+bootTime)
	defer cancel()
	log, err := os.Create(console)
	if err != nil {
		return report{Error: err.Error()}
	}
	defer log.Close()
	cmd := exec.CommandContext(ctx, emulator, arguments(t.image, initrd, result)...)
	cmd.Stdout, cmd.Stderr = log, log
	if o.console {
		cmd.Stdout = io.MultiWriter(log, os.Stdout)
	}
	began := time.Now()
	err = cmd.Run()
	if ctx.Err() != nil {
		err = fmt.Errorf("not done after %v: %w", time.Since(began).Round(time.Second), ctx.Err())
	}
	return readReport(result, console, err)
}

// arguments have no network, no disk and two serial ports: the console, and one for the report. The
// emulation is in software: the guest's kernel is the one under test, whatever the machine has.
func arguments(image, initrd, result string) []string {
	return []string{
		"-accel", "tcg,thread=single", "-cpu", "max", "-smp", "2", "-m", memory, "-no-reboot", "-nic", "none", "-display", "none", "-monitor", "none",
		"-serial", "stdio", "-serial", "file:" + result, "-kernel", image, "-initrd", initrd,
		"-append", "console=ttyS0 panic=-1 quiet mitigations=off nokaslr random.trust_cpu=on",
	}
}

// readReport takes the guest's own word, or says how it ended without one.
func readReport(result, console string, ended error) report {
	text, err := os.ReadFile(result)
	var r report
	if err == nil {
		err = json.Unmarshal(bytes.TrimSpace(text), &r)
	}
	if err == nil {
		return r
	}
	words, _ := os.ReadFile(console) // what there is
	r = parse(strings.ReplaceAll(string(words), "\r", ""))
	r.Error = fmt.Sprintf("the guest ended without a report: %v", errors.Join(ended, err))
	return r
}
