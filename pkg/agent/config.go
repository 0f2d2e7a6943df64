package agent

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

// Options are what a process gives to Run, Guard, Check and Uninstall.
type Options struct {
	// ConfigFile holds one AgentConfig. It must be root's alone to write.
	ConfigFile string
	// Node is the name of this node, where one configuration is that of many; empty: the one in the configuration.
	Node string
	// Version of this program, for status and metrics.
	Version string
	// NotifySocket is where the service manager listens (NOTIFY_SOCKET); empty: nowhere.
	NotifySocket string
	// Logger takes one line for each change of state; nil: none.
	Logger *slog.Logger
}

func (o Options) logger() *slog.Logger {
	if o.Logger == nil {
		return slog.New(slog.DiscardHandler)
	}
	return o.Logger
}

func (o Options) config() (policy.AgentConfig, error) {
	cfg, err := loadConfig(o.ConfigFile)
	if err != nil {
		return policy.AgentConfig{}, err
	}
	return cfg.For(o.Node)
}

// loadConfig reads a configuration that root alone can have written. Every problem comes back at once, with its line.
func loadConfig(path string) (policy.AgentConfig, error) {
	if err := checkTrusted(path); err != nil {
		return policy.AgentConfig{}, fmt.Errorf("load configuration: %w", err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return policy.AgentConfig{}, fmt.Errorf("load configuration: %w", err)
	}
	return policy.ParseAgentConfig(path, data)
}

// Check reads configuration and resources as Run would, and asks whether the kernel, the control group and the bpffs that
// it needs are there; it changes nothing. Every problem comes back at once.
func Check(o Options) error {
	cfg, err := o.config()
	if err != nil {
		return err
	}
	_, cgroup := backstopCgroup(cfg)
	machine := []error{datapath.CheckKernel(datapath.Profile(cfg.Spec.Hooks)), cgroup, datapath.CheckBPFFS(cfg.PinDir())}
	machine = slices.DeleteFunc(machine, func(err error) bool { return errors.Is(err, fs.ErrPermission) }) // only root can ask
	return errors.Join(append(machine, checkResources(cfg), checkCertificates(cfg))...)
}

// checkResources reads the files of resources. Those of a cluster are for the API server to check, and for the running agent.
func checkResources(cfg policy.AgentConfig) error {
	if cfg.Spec.Kubernetes != nil {
		_, err := kubeSource(cfg, nil)
		return err
	}
	offered, err := files(cfg.Spec.Resources).read()
	if errors.Is(err, ErrUntrusted) {
		_, wrong := policy.LoadDir(cfg.Spec.Resources)
		err = errors.Join(err, wrong)
	}
	if err != nil {
		return err
	}
	return errors.Join(checkSigned(cfg, offered), offered.set.CheckNode(cfg))
}

// checkCertificates reads the web certificates as the proxy will, which starts without those that it cannot read.
func checkCertificates(cfg policy.AgentConfig) error {
	var errs []error
	for i, w := range cfg.Spec.Proxy.Certificates {
		if _, err := tls.LoadX509KeyPair(w.CertFile, w.KeyFile); err != nil && !errors.Is(err, fs.ErrPermission) {
			errs = append(errs, fmt.Errorf("spec.proxy.certificates[%d]: read web certificate %s: %w: put certificate and key there, in PEM, for the proxy's user to read", i, w.Name, err))
		}
	}
	return errors.Join(errs...)
}

// checkSigned asks whether the agent would put the set to work in the place of the last one.
func checkSigned(cfg policy.AgentConfig, offered offer) error {
	signed := signedOnly(cfg, bootClock())
	if signed == nil {
		return nil
	}
	last, err := (&resources{verified: verifiedFile(cfg)}).last()
	if err != nil {
		return fmt.Errorf("load last verified resources: %w", err)
	}
	_, err = signed.admit(last, offered)
	return err
}

// makeDirs makes the directories that the agent writes to. The state directory is closed to others; the run directory holds
// what the proxy reads.
func makeDirs(cfg policy.AgentConfig) error {
	for dir, mode := range map[string]os.FileMode{cfg.Spec.StateDir: 0o700, cfg.Spec.RunDir: 0o755} {
		if err := os.MkdirAll(dir, mode); err != nil {
			return fmt.Errorf("make directory: %w", err)
		}
		if err := checkTrusted(dir); err != nil {
			return err
		}
	}
	return nil
}

// Files of the state directory.
func storeFile(cfg policy.AgentConfig) string { return filepath.Join(cfg.Spec.StateDir, "node.db") }

// witnessFile is of this boot: it knows how far the store was.
func witnessFile(cfg policy.AgentConfig) string {
	return filepath.Join(cfg.Spec.RunDir, "store.witness")
}

// panicFile says that a panic stands, until the store does.
func panicFile(cfg policy.AgentConfig) panicMark {
	return panicMark(filepath.Join(cfg.Spec.RunDir, "panic"))
}

// podsFile is what the cluster said of this node's pods last.
func podsFile(cfg policy.AgentConfig) string { return filepath.Join(cfg.Spec.StateDir, "pods.json") }

// verifiedFile is one file for sets that were signed and another for those that were not: who goes over to signatures begins
// with a signed set, and who comes back to them goes on from the last.
func verifiedFile(cfg policy.AgentConfig) string {
	if cfg.Spec.PolicySignatures == policy.SignaturesRequired {
		return filepath.Join(cfg.Spec.StateDir, "verified-signed.yaml")
	}
	return filepath.Join(cfg.Spec.StateDir, "verified.yaml")
}

// signedOnly is nil where the configuration asks for no signatures.
func signedOnly(cfg policy.AgentConfig, c clock) *signedSets {
	if cfg.Spec.PolicySignatures != policy.SignaturesRequired {
		return nil
	}
	return &signedSets{name: cfg.Spec.PolicySet, pinned: cfg.Spec.PolicyKeys, now: c.wall}
}

// spoolDir keeps the flow records that the collector does not have.
func spoolDir(cfg policy.AgentConfig) string { return filepath.Join(cfg.Spec.StateDir, "flows") }

func lossFilePath(cfg policy.AgentConfig) string {
	return filepath.Join(cfg.Spec.StateDir, "losses.json")
}
