package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/proxy"
	"github.com/sallyport-dev/sallyport/pkg/px"
)

// execCommand is the first argument by which another program takes the proxy's place.
const execCommand = "exec"

const execUsage = `usage: sallyport-proxy exec [--config FILE] [--listen NAME] -- PROGRAM [ARGUMENT]...

Waits for the px namespace and becomes PROGRAM in it, as the user of spec.proxy and with CAP_NET_RAW alone: another
proxy in the place of this one. It needs a listener on spec.proxy.listenPort. docs/other-proxies.md has configurations
of HAProxy and nginx.

`

// execOptions of the command line.
type execOptions struct {
	config  string
	listen  string // variable that tells the program its listeners; empty: it makes them itself
	command []string
}

func parseExec(env environment) (execOptions, error) {
	var o execOptions
	flags := flag.NewFlagSet("sallyport-proxy exec", flag.ContinueOnError)
	flags.SetOutput(env.stderr)
	flags.StringVar(&o.config, "config", "/etc/sallyport/agent.yaml", "`FILE` with the node's AgentConfig")
	flags.StringVar(&o.listen, "listen", "", "open the transparent listeners for the program, and tell it their descriptors in the variable `NAME`,\n"+
		"each with a semicolon behind it: NGINX is the one of nginx")
	flags.Usage = func() {
		fmt.Fprint(env.stderr, execUsage)
		flags.PrintDefaults()
	}
	if err := flags.Parse(env.args[2:]); err != nil {
		return o, err
	}
	o.command = flags.Args()
	if len(o.command) == 0 {
		return o, errors.New("exec: no program is named\nhint: sallyport-proxy exec -- haproxy -db -f /etc/haproxy/sallyport.cfg")
	}
	if strings.ContainsAny(o.listen, "=\x00") {
		return o, fmt.Errorf("exec: --listen %q is no name of a variable\nhint: nginx takes its listeners from NGINX", o.listen)
	}
	return o, nil
}

// runExec returns only with an error or when ctx ends.
func runExec(ctx context.Context, env environment) error {
	opts, err := parseExec(env)
	if err != nil {
		return err
	}
	data, err := os.ReadFile(opts.config)
	if err != nil {
		return err
	}
	cfg, err := policy.ParseAgentConfig(opts.config, data)
	if err != nil {
		return err
	}
	program, err := findProgram(opts.command[0])
	if err != nil {
		return err
	}
	l := launcher{config: cfg, path: opts.config, env: env, log: slog.New(slog.NewTextHandler(env.stderr, nil))}
	if err := l.prepare(); err != nil {
		return err
	}
	command := px.Command{Program: program, Args: opts.command, Env: env.vars}
	if opts.listen != "" {
		command.Inside = func() ([]string, error) { return listeners(opts.listen, cfg.Spec.Proxy.ListenPort) }
	}
	return l.enter(ctx, command)
}

// findProgram looks in PATH now: in px, as another user, it would be too late to say what is wrong.
func findProgram(name string) (string, error) {
	program, err := exec.LookPath(name)
	if err == nil {
		program, err = filepath.Abs(program)
	}
	if err != nil {
		return "", fmt.Errorf("exec: find program: %w\nhint: name it with its folder, as in /usr/sbin/haproxy", err)
	}
	return program, nil
}

// listeners opens them in the namespace of the calling thread, for a program that cannot make its own transparent. They stay
// open over exec.
func listeners(variable string, port uint16) ([]string, error) {
	all, err := proxy.Listen(port)
	if err != nil {
		return nil, err
	}
	value := variable + "="
	for _, l := range all {
		fd, err := inherited(l)
		if err != nil {
			return nil, fmt.Errorf("hand over listener %s: %w", l.Addr(), err)
		}
		value += fmt.Sprintf("%d;", fd)
	}
	return []string{value}, nil
}

// inherited is a descriptor of the listener that exec does not close.
func inherited(l *net.TCPListener) (fd int, err error) {
	raw, err := l.SyscallConn()
	if err != nil {
		return -1, err
	}
	controlErr := raw.Control(func(own uintptr) { fd, err = unix.Dup(int(own)) })
	return fd, errors.Join(controlErr, err)
}
