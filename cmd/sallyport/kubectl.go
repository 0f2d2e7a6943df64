package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/sallyport-dev/sallyport/pkg/build"
)

// pluginName is what kubectl looks for when somebody writes `kubectl sallyport`: this program by another name.
const pluginName = "kubectl-sallyport"

// inPod are the commands that need nothing but the agent's socket: no file, no key and no identity of whoever calls them.
var inPod = []string{"status", "services", "flows", "grants", "paths", "explain", "grant show", "grant revoke", "panic", "rollout status", "rollout halt"}

// plugin is one run as `kubectl sallyport`. It asks the cluster by kubectl alone, with whatever kubectl was set up with.
type plugin struct {
	env
	node, namespace string
	context, config string
}

// runPlugin executes one command line of kubectl.
func runPlugin(ctx context.Context, e env, args []string) error {
	p := &plugin{env: e}
	cmd := &cobra.Command{
		Use:         pluginName + " [flags] COMMAND [ARGUMENT...]",
		Annotations: map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl sallyport"},
		Short:       "Look at a node of the cluster, and end what goes around the proxy there",
		Long: `Run sallyport in the pod of a node's agent, as root there, by "kubectl exec". These are the commands that need nothing
but the agent's socket; all others are called where their files, keys and identities are:

  ` + strings.Join(inPod, "\n  ") + `

Flags of ours come before the COMMAND, and its own after it.`,
		Example: `  kubectl sallyport --node node-1 status
  kubectl sallyport --node node-1 flows --verdict denied --follow
  kubectl sallyport --node node-1 grant revoke 01J8ZQ4X5M3T9V0Y2B7C6D1E4F --why "backup is done"`,
		Version:       build.Version(),
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			return p.run(cmd.Context(), args)
		},
	}
	cmd.SetOut(e.stdout)
	cmd.SetErr(e.stderr)
	cmd.SetArgs(args)
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		return withHint(&exitError{exitUsage, err}, "flags of the COMMAND come after it; `kubectl sallyport --help` shows those before it")
	})
	cmd.SetVersionTemplate(build.Read().Describe(pluginName))
	f := cmd.Flags()
	f.SortFlags = false
	f.SetInterspersed(false)
	f.StringVar(&p.node, "node", "", "`NODE` to look at; not needed where there is only one")
	f.StringVarP(&p.namespace, "namespace", "n", "sallyport-system", "`NAMESPACE` of Sallyport's pods")
	f.StringVar(&p.context, "context", "", "`CONTEXT` of the kubeconfig")
	f.StringVar(&p.config, "kubeconfig", "", "kubeconfig `FILE`")
	return cmd.ExecuteContext(ctx)
}

func (p *plugin) run(ctx context.Context, args []string) error {
	if err := p.check(args); err != nil {
		return err
	}
	kubectl, err := exec.LookPath("kubectl")
	if err != nil {
		return withHint(notRun(err), "install kubectl, or call sallyport on the node")
	}
	pod, err := p.pod(ctx, kubectl)
	if err != nil {
		return err
	}
	words := append(p.words("exec"), pod, "--container", "agent")
	if isTerminal(p.stdin) && isTerminal(p.stdout) {
		words = append(words, "--stdin", "--tty") // so that ^C ends what follows, in the pod too
	}
	words = append(append(words, "--", "/sallyport"), args...)
	// Its terminal, its signals and its exit code, which is that of sallyport, are kubectl's from here on.
	return notRun(unix.Exec(kubectl, words, os.Environ()))
}

// check refuses what cannot do there what it would do here.
func (p *plugin) check(args []string) error {
	cmd, _, err := newRoot(p.env).Find(args)
	if err != nil {
		return usagef("%v", err)
	}
	_, name, _ := strings.Cut(cmd.CommandPath(), " ")
	switch {
	case slices.Contains(inPod, name):
		return nil
	case name == "" || cmd.HasSubCommands():
		return withHint(usagef("unknown command %q", strings.Join(args, " ")), "`kubectl sallyport --help` lists the commands")
	}
	return withHint(usagef("`%s` needs more than the agent's socket", cmd.CommandPath()), "call it where its files, keys and identities are; `kubectl sallyport --help` lists what runs in the pod")
}

// words are kubectl's own, before what they are about.
func (p *plugin) words(verb string) []string {
	words := []string{"kubectl"}
	if p.config != "" {
		words = append(words, "--kubeconfig", p.config)
	}
	if p.context != "" {
		words = append(words, "--context", p.context)
	}
	return append(words, verb, "--namespace", p.namespace)
}

// agentPods lists, a line each, nodes and the pods of their agents.
const agentPods = `-o=jsonpath={range .items[*]}{.spec.nodeName}{" "}{.metadata.name}{"\n"}{end}`

// pod finds the one of the node. With no node named there must be one alone: an answer of just any node would be taken for that of all.
func (p *plugin) pod(ctx context.Context, kubectl string) (string, error) {
	running := "status.phase=Running"
	if p.node != "" {
		running += ",spec.nodeName=" + p.node
	}
	words := append(p.words("get"), "pods", "--selector", "app.kubernetes.io/name=sallyport", "--field-selector", running, agentPods)
	cmd := exec.CommandContext(ctx, kubectl, words[1:]...)
	cmd.Stderr = p.stderr
	out, err := cmd.Output()
	if err != nil {
		return "", withHint(&exitError{exitUnreachable, fmt.Errorf("find pods of agents: kubectl get: %w", err)}, "what kubectl said is above")
	}
	var nodes, pods []string
	for line := range strings.Lines(string(out)) {
		node, pod, _ := strings.Cut(strings.TrimSpace(line), " ")
		nodes, pods = append(nodes, node), append(pods, pod)
	}
	switch {
	case len(pods) == 0:
		return "", withHint(&exitError{exitUnreachable, fmt.Errorf("no agent runs on %s, in the namespace %s", either(p.node, "any node"), p.namespace)},
			"`kubectl get pods -n %s -o wide` shows what is there; what was enforced goes on without an agent", p.namespace)
	case p.node == "" && len(pods) > 1:
		return "", withHint(usagef("no node is named, and %d have an agent", len(pods)), "name one with --node: %s", strings.Join(nodes, ", "))
	}
	return pods[0], nil
}

func isTerminal(stream any) bool {
	file, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(file.Fd()))
}
