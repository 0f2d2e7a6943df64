package devauthority

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// SPIREVariable names the environment variable with the folder of spire-server and spire-agent.
const SPIREVariable = "SPIRE_BIN_DIR"

// SPIREHint tells people how to get what ErrNoSPIRE misses.
const SPIREHint = "unpack SPIRE's own release (https://github.com/spiffe/spire/releases), " +
	"and name the folder with its programs: " + SPIREVariable + "=/opt/spire/bin"

// ErrNoSPIRE is the error for a folder that has not both programs.
var ErrNoSPIRE = errors.New("no SPIRE")

// SPIREConfig says where a SPIRE runs. All fields but Delegates must be set.
type SPIREConfig struct {
	// Bin is the folder of spire-server and spire-agent.
	Bin string
	// Dir is made (0700) for what they keep: keys, certificates, entries.
	Dir string
	// Socket of the Workload API.
	Socket      string
	TrustDomain spiffeid.TrustDomain
	// Port of the server on 127.0.0.1.
	Port uint16
	// Delegates may ask for identities of others, by either API. None: nobody can.
	Delegates []spiffeid.ID
}

// SPIRE is a real server and a real agent of it, in the embedded authority's place: the agent joins by a
// token and tells workloads apart by user and program. The caller starts both, in whatever namespace.
type SPIRE struct{ cfg SPIREConfig }

// CheckSPIRE looks for the programs in a folder. Errors: ErrNoSPIRE.
func CheckSPIRE(bin string) error {
	if bin == "" {
		return fmt.Errorf("%w: %s is not set", ErrNoSPIRE, SPIREVariable)
	}
	for _, name := range []string{"spire-server", "spire-agent"} {
		if _, err := exec.LookPath(filepath.Join(bin, name)); err != nil {
			return fmt.Errorf("%w: %s names a folder without %s: %w", ErrNoSPIRE, SPIREVariable, name, errors.Unwrap(err))
		}
	}
	return nil
}

// NewSPIRE looks for the programs and writes their configuration.
func NewSPIRE(cfg SPIREConfig) (*SPIRE, error) {
	if err := CheckSPIRE(cfg.Bin); err != nil {
		return nil, err
	}
	s := &SPIRE{cfg}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make folder of SPIRE: %w", err)
	}
	return s, errors.Join(s.write("server.conf", s.serverConfig()), s.write("agent.conf", s.agentConfig()))
}

func (s *SPIRE) program(name string) string { return filepath.Join(s.cfg.Bin, name) }

func (s *SPIRE) path(name string) string { return filepath.Join(s.cfg.Dir, name) }

func (s *SPIRE) write(name, text string) error {
	if err := os.WriteFile(s.path(name), []byte(text), 0o600); err != nil {
		return fmt.Errorf("write %s of SPIRE: %w", name, err)
	}
	return nil
}

func (s *SPIRE) serverConfig() string {
	return fmt.Sprintf(`server {
  trust_domain = %q
  bind_address = "127.0.0.1"
  bind_port = "%d"
  socket_path = %q
  data_dir = %q
}
plugins {
  DataStore "sql" { plugin_data { database_type = "sqlite3", connection_string = %q } }
  KeyManager "disk" { plugin_data { keys_path = %q } }
  NodeAttestor "join_token" { plugin_data {} }
}
`, s.cfg.TrustDomain.Name(), s.cfg.Port, s.path("server.sock"), s.path("server"), s.path("entries.db"), s.path("server.keys"))
}

func (s *SPIRE) agentConfig() string {
	return fmt.Sprintf(`agent {
  trust_domain = %q
  server_address = "127.0.0.1"
  server_port = "%d"
  socket_path = %q
  data_dir = %q
  trust_bundle_path = %q
  join_token_file = %q
%s}
plugins {
  KeyManager "disk" { plugin_data { directory = %q } }
  NodeAttestor "join_token" { plugin_data {} }
  WorkloadAttestor "unix" { plugin_data { discover_workload_path = true, workload_size_limit = -1 } }
}
`, s.cfg.TrustDomain.Name(), s.cfg.Port, s.cfg.Socket, s.path("agent"), s.path("bundle.pem"), s.path("token"), s.onBehalf(), s.path("agent"))
}

// onBehalf are the lines of the agent's configuration that let others be asked for.
func (s *SPIRE) onBehalf() string {
	if len(s.cfg.Delegates) == 0 {
		return ""
	}
	var ids, brokers []string
	for _, id := range s.cfg.Delegates {
		ids = append(ids, strconv.Quote(id.String()))
		brokers = append(brokers, fmt.Sprintf("{ id = %q, allowed_reference_types = [{ type_url = \"*\" }] }", id))
	}
	return fmt.Sprintf(`  admin_socket_path = %q
  authorized_delegates = [%s]
  experimental {
    broker {
      socket_path = %q
      brokers = [%s]
    }
  }
`, s.delegatedSocket(), strings.Join(ids, ", "), s.brokerSocket(), strings.Join(brokers, ", "))
}

func (s *SPIRE) delegatedSocket() string { return s.path("admin/admin.sock") }

func (s *SPIRE) brokerSocket() string { return s.path("broker/broker.sock") }

// DelegatedAddress is of the Delegated Identity API.
func (s *SPIRE) DelegatedAddress() string { return "unix://" + s.delegatedSocket() }

// BrokerAddress is of the SPIFFE Broker API, which SPIRE has since 1.15.2.
func (s *SPIRE) BrokerAddress() string { return "unix://" + s.brokerSocket() }

// Address of the Workload API.
func (s *SPIRE) Address() string { return "unix://" + s.cfg.Socket }

// Server is the server's command.
func (s *SPIRE) Server() *exec.Cmd {
	return exec.Command(s.program("spire-server"), "run", "-config", s.path("server.conf"))
}

// Agent is the agent's command.
func (s *SPIRE) Agent() *exec.Cmd {
	return exec.Command(s.program("spire-agent"), "run", "-config", s.path("agent.conf"))
}

// node is the identity of the agent, whichever way it joined: what all entries are below.
func (s *SPIRE) node() spiffeid.ID { return spiffeid.RequireFromPath(s.cfg.TrustDomain, "/spire-node") }

// Join waits for the server and gives the agent what it joins by. It is called once, before the agent is
// started for the first time: an agent that has joined keeps its own certificate.
func (s *SPIRE) Join(ctx context.Context) error {
	if err := s.healthy(ctx, "spire-server", s.path("server.sock")); err != nil {
		return err
	}
	bundle, err := s.Control(ctx, "bundle", "show")
	if err != nil {
		return err
	}
	answer, err := s.Control(ctx, "token", "generate", "-spiffeID", s.node().String(), "-output", "json")
	if err != nil {
		return err
	}
	var token struct{ Value string }
	if err := json.Unmarshal([]byte(answer), &token); err != nil || token.Value == "" {
		return fmt.Errorf("read join token %q: %w", answer, err)
	}
	return errors.Join(s.write("bundle.pem", bundle), s.write("token", token.Value))
}

// Ready waits for the agent.
func (s *SPIRE) Ready(ctx context.Context) error { return s.healthy(ctx, "spire-agent", s.cfg.Socket) }

// healthyPause is between two questions, each of which is a process.
const healthyPause = 200 * time.Millisecond

func (s *SPIRE) healthy(ctx context.Context, program, socket string) error {
	for {
		err := s.ask(ctx, program, "healthcheck", "-socketPath", socket)
		if err == nil {
			return nil
		}
		select {
		case <-time.After(healthyPause):
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", program, err)
		}
	}
}

func (s *SPIRE) ask(ctx context.Context, program string, args ...string) error {
	out, err := exec.CommandContext(ctx, s.program(program), args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", program, args[0], err, strings.TrimSpace(string(out)))
	}
	return nil
}

// Control runs a command of spire-server's own CLI and gives its standard output.
func (s *SPIRE) Control(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, s.program("spire-server"), append(args, "-socketPath", s.path("server.sock"))...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("spire-server %s: %w: %s%s", strings.Join(args, " "), err, out, stderr.String())
	}
	return string(out), nil
}

// Register makes the entry of an identity, which every process has that matches all selectors
// ("unix:uid:1000"). ttl is how long its certificates are valid; SPIRE renews them at half of it.
func (s *SPIRE) Register(ctx context.Context, entry string, id spiffeid.ID, ttl time.Duration, selectors ...string) error {
	args := []string{"entry", "create", "-entryID", entry, "-parentID", s.node().String(), "-spiffeID", id.String(),
		"-x509SVIDTTL", fmt.Sprint(int(ttl.Seconds()))}
	for _, selector := range selectors {
		args = append(args, "-selector", selector)
	}
	_, err := s.Control(ctx, args...)
	return err
}

// Delete takes an entry away.
func (s *SPIRE) Delete(ctx context.Context, entry string) error {
	_, err := s.Control(ctx, "entry", "delete", "-entryID", entry)
	return err
}
