package main

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"

	"github.com/sallyport-dev/sallyport/pkg/collector"
	"github.com/sallyport-dev/sallyport/pkg/policy"
)

const kindCollectorConfig = "CollectorConfig"

// config is the collector's configuration file.
type config struct {
	APIVersion string   `yaml:"apiVersion"`
	Kind       string   `yaml:"kind"`
	Metadata   metadata `yaml:"metadata"`
	Spec       spec     `yaml:"spec"`
}

type metadata struct {
	Name string `yaml:"name"`
}

// spec is what a CollectorConfig says. Defaults stand behind each field.
type spec struct {
	// TrustDomain of the nodes and of the collector itself. It has no default.
	TrustDomain string `yaml:"trustDomain"`
	// ID is the collector's own SPIFFE ID: spiffe://<trustDomain>/sallyport/collector.
	ID string `yaml:"id"`
	// Listen is the address for nodes and remote readers: :9443.
	Listen string `yaml:"listen"`
	// WorkloadAPI gives the collector its identity: unix:///run/spire/sockets/agent.sock.
	WorkloadAPI string `yaml:"workloadAPI"`
	// DataDir keeps the log's key, and the records, one file per day: /var/lib/sallyport-collector.
	DataDir string `yaml:"dataDir"`
	// Postgres keeps the records in the place of files: none.
	Postgres postgres `yaml:"postgres"`
	// Readers are SPIFFE IDs that may read over the network, exact or a prefix ending in /*: none.
	Readers []string `yaml:"readers"`
	// Actors are SPIFFE IDs, written like Readers, that may have nodes end grants: none. The users of the socket may, too.
	Actors []string `yaml:"actors"`
	// Socket is the Unix socket of local readers: /run/sallyport-collector/collector.sock.
	Socket string `yaml:"socket"`
	// Operators may use the socket.
	Operators operators `yaml:"operators"`
	// Retain is how long a day is kept after it ended: 2160h (90 days). At least 24h; 0: for ever.
	Retain string `yaml:"retain"`
	// Limits of each node; over them its records wait.
	Limits limits `yaml:"limits"`
	// Metrics is the address that serves Prometheus metrics: none.
	Metrics string `yaml:"metrics"`
	// Console is where browsers are served.
	Console consoleSpec `yaml:"console"`

	retain time.Duration // Retain, read
}

type operators struct {
	// UIDs are user ids: root alone.
	UIDs []uint32 `yaml:"uids"`
}

type consoleSpec struct {
	// Listen is the address of the console, over HTTPS: none. Readers show their certificates there; those who are actors, too, may act.
	Listen string `yaml:"listen"`
	// Certificate and Key are files (PEM) of a certificate that browsers know; they are read anew for each connection. Left out, the
	// collector shows its own identity.
	Certificate string `yaml:"certificate"`
	Key         string `yaml:"key"`
}

type limits struct {
	// RecordsPerSecond is 20000 unless it is set. 0: no limit.
	RecordsPerSecond int `yaml:"recordsPerSecond"`
	// BytesPerSecond is 32 MiB unless it is set. 0: no limit.
	BytesPerSecond int `yaml:"bytesPerSecond"`
}

// postgres is a database, named in one of two ways.
type postgres struct {
	// URL is postgres://USER@HOST/NAME or host=HOST user=USER dbname=NAME, without a password.
	URL string `yaml:"url"`
	// URLFile has the URL, with a password or not, and is read at the start.
	URLFile string `yaml:"urlFile"`
}

// address is the URL, from wherever it is.
func (p postgres) address() (string, error) {
	if p.URLFile == "" {
		return p.URL, nil
	}
	text, err := os.ReadFile(p.URLFile)
	hint := "name a file that the collector's user can read"
	address := strings.TrimSpace(string(text))
	if err == nil {
		hint = "write the URL of the database in it, alone"
		if err = collector.CheckPostgres(address); address == "" {
			err = errors.New("it is empty")
		}
	}
	if err != nil {
		return "", &policy.Error{File: p.URLFile, Field: "spec.postgres.urlFile", Msg: err.Error(), Hint: hint, Err: err}
	}
	return address, nil
}

func defaultSpec() spec {
	return spec{
		Listen: ":9443", WorkloadAPI: "unix:///run/spire/sockets/agent.sock", DataDir: "/var/lib/sallyport-collector",
		Socket: "/run/sallyport-collector/collector.sock", Operators: operators{UIDs: []uint32{0}},
		Retain: "2160h", Limits: limits{RecordsPerSecond: 20000, BytesPerSecond: 32 << 20},
	}
}

// override are the flags that stand above the file.
type override struct{ listen, socket, dataDir string }

func (o override) apply(c *config) {
	for _, f := range []struct {
		flag string
		to   *string
	}{{o.listen, &c.Spec.Listen}, {o.socket, &c.Spec.Socket}, {o.dataDir, &c.Spec.DataDir}} {
		if f.flag != "" {
			*f.to = f.flag
		}
	}
}

func (c config) trustDomain() spiffeid.TrustDomain {
	return spiffeid.RequireTrustDomainFromString(c.Spec.TrustDomain)
}

func (c config) id() spiffeid.ID { return spiffeid.RequireFromString(c.Spec.ID) }

func (c config) collector(source collector.Source, database string, log *slog.Logger) collector.Config {
	return collector.Config{
		Dir: c.Spec.DataDir, Postgres: database, TrustDomain: c.trustDomain(), Source: source, Listen: c.Spec.Listen, Readers: c.Spec.Readers, Actors: c.Spec.Actors,
		Socket: c.Spec.Socket, SocketUIDs: c.Spec.Operators.UIDs, Retain: c.Spec.retain, Metrics: c.Spec.Metrics, Logger: log,
		Console: collector.Console{Listen: c.Spec.Console.Listen, Certificate: c.Spec.Console.Certificate, Key: c.Spec.Console.Key},
		Limits:  collector.Limits{RecordsPerSecond: c.Spec.Limits.RecordsPerSecond, BytesPerSecond: c.Spec.Limits.BytesPerSecond},
	}
}

// parseConfig reads a CollectorConfig, strictly. Every problem comes back at once, as errors.Join of
// *policy.Error with its line.
func parseConfig(name string, data []byte) (config, error) {
	r := &reader{file: name, bad: map[int]bool{}}
	c := config{Spec: defaultSpec()}
	d := yaml.NewDecoder(bytes.NewReader(data))
	d.KnownFields(true)
	err := d.Decode(&c)
	if errors.Is(err, io.EOF) {
		r.add(0, "", "is empty", "write a CollectorConfig in it")
	} else if r.addYAML(err); yaml.Unmarshal(data, &r.root) == nil && !hasTwice(err) {
		c.validate(r)
	}
	var typed *yaml.TypeError // anything else ends the reading for good
	if (err == nil || errors.As(err, &typed)) && !errors.Is(d.Decode(new(yaml.Node)), io.EOF) {
		r.add(0, "", "has more than one document", "a CollectorConfig is alone in its file")
	}
	if err := r.err(); err != nil {
		return config{}, err
	}
	if c.Spec.ID == "" {
		c.Spec.ID = "spiffe://" + c.Spec.TrustDomain + "/sallyport/collector"
	}
	return c, nil
}

func (c *config) validate(r *reader) {
	r.check(c.APIVersion == policy.APIVersion, "apiVersion", fmt.Sprintf("want %s, got %q", policy.APIVersion, c.APIVersion), "")
	r.check(c.Kind == kindCollectorConfig, "kind", fmt.Sprintf("want %s, got %q", kindCollectorConfig, c.Kind), "")
	s := c.Spec
	td, err := spiffeid.TrustDomainFromString(s.TrustDomain)
	r.check(err == nil, "spec.trustDomain", fmt.Sprintf("%q is no trust domain", s.TrustDomain), "write the name alone, like example.org")
	if s.ID != "" && err == nil {
		id, err := spiffeid.FromString(s.ID)
		r.check(err == nil && id.MemberOf(td), "spec.id", fmt.Sprintf("%q is no SPIFFE ID of %s", s.ID, td), "leave it out for spiffe://"+td.Name()+"/sallyport/collector")
	}
	r.check(isAddress(s.Listen), "spec.listen", fmt.Sprintf("%q is no address with a port", s.Listen), addressHint)
	r.check(s.Metrics == "" || isAddress(s.Metrics), "spec.metrics", fmt.Sprintf("%q is no address with a port", s.Metrics), addressHint)
	r.check(s.Limits.RecordsPerSecond >= 0, "spec.limits.recordsPerSecond", "is negative", "write 0 for no limit")
	r.check(s.Limits.BytesPerSecond >= 0, "spec.limits.bytesPerSecond", "is negative", "write 0 for no limit")
	r.check(strings.HasPrefix(s.WorkloadAPI, "unix:///") || strings.HasPrefix(s.WorkloadAPI, "tcp://"), "spec.workloadAPI",
		fmt.Sprintf("%q is no Workload API address", s.WorkloadAPI), "write unix:///PATH")
	r.check(filepath.IsAbs(s.DataDir), "spec.dataDir", fmt.Sprintf("%q is no absolute path", s.DataDir), "begin it with /")
	p := s.Postgres
	r.check(p.URL == "" || collector.CheckPostgres(p.URL) == nil, "spec.postgres.url", "is no address of a database", "write postgres://USER@HOST/NAME or host=HOST user=USER dbname=NAME")
	r.check(!passwordInside.MatchString(p.URL), "spec.postgres.url", "has a password, and who reads this file is not to know it", "write the URL into a file that only the collector's user can read, and name that as urlFile")
	r.check(p.URLFile == "" || filepath.IsAbs(p.URLFile), "spec.postgres.urlFile", fmt.Sprintf("%q is no absolute path", p.URLFile), "begin it with /")
	r.check(p.URL == "" || p.URLFile == "", "spec.postgres.urlFile", "stands beside a url", "write one of the two")
	r.check(s.Socket == "" || filepath.IsAbs(s.Socket), "spec.socket", fmt.Sprintf("%q is no absolute path", s.Socket), `begin it with /, or write "" for none`)
	c.Spec.retain, err = time.ParseDuration(s.Retain)
	r.check(err == nil, "spec.retain", fmt.Sprintf("%q is not a duration", s.Retain), "write a number with its unit, like 2160h")
	r.check(c.Spec.retain == 0 || c.Spec.retain >= 24*time.Hour, "spec.retain", s.Retain+" is less than a day", "at least 24h, or 0s to keep records for ever")
	r.check(s.Socket == "" || len(s.Operators.UIDs) > 0, "spec.operators.uids", "nobody may use the socket", `list user ids, or write socket: ""`)
	s.Console.validate(r)
	for i, reader := range s.Readers {
		err := collector.CheckReaders([]string{reader})
		r.check(err == nil, fmt.Sprintf("spec.readers[%d]", i), fmt.Sprint(err), peopleHint)
	}
	for i, actor := range s.Actors {
		err := collector.CheckActors([]string{actor})
		r.check(err == nil, fmt.Sprintf("spec.actors[%d]", i), fmt.Sprint(err), peopleHint)
	}
}

// passwordInside finds a password in either form of a database's address.
var passwordInside = regexp.MustCompile(`^[a-z]+://[^/?#]*:[^/?#@]*@|password\s*=`)

// pair reads what browsers are shown, if anything is named.
func (s consoleSpec) pair() error {
	if s.Certificate == "" {
		return nil
	}
	_, err := tls.LoadX509KeyPair(s.Certificate, s.Key)
	if err == nil {
		return nil
	}
	return &policy.Error{Field: "spec.console", Msg: "browsers cannot be shown the certificate: " + err.Error(), Err: err,
		Hint: fmt.Sprintf("have %s and %s be a certificate and its key (PEM) that the collector's user can read", s.Certificate, s.Key)}
}

func (s consoleSpec) validate(r *reader) {
	r.check(s.Listen == "" || isAddress(s.Listen), "spec.console.listen", fmt.Sprintf("%q is no address with a port", s.Listen), addressHint)
	r.check(s.Listen != "" || s.Certificate == "" && s.Key == "", "spec.console", "there is a certificate, and no address", "write listen: HOST:PORT, or leave it all out")
	for field, path := range map[string]string{"certificate": s.Certificate, "key": s.Key} {
		r.check(path == "" || filepath.IsAbs(path), "spec.console."+field, fmt.Sprintf("%q is no absolute path", path), "begin it with /")
	}
	r.check((s.Certificate == "") == (s.Key == ""), "spec.console", "a certificate and its key are named together", "name both, or none for the collector's own identity")
}

const peopleHint = "write a SPIFFE ID, or a prefix ending in /*"

const addressHint = "write HOST:PORT with a port from 1 to 65535, or :PORT for every address"

func isAddress(s string) bool {
	_, port, err := net.SplitHostPort(s)
	n, portErr := strconv.ParseUint(port, 10, 16)
	return err == nil && portErr == nil && n > 0
}

// reader collects problems with their lines.
type reader struct {
	file string
	root yaml.Node
	bad  map[int]bool // lines with a problem: what follows from it is not told
	errs []error
}

func (r *reader) add(line int, field, msg, hint string) {
	r.bad[line] = true
	r.errs = append(r.errs, &policy.Error{File: r.file, Line: line, Field: field, Msg: msg, Hint: hint})
}

func (r *reader) check(ok bool, field, msg, hint string) {
	if line := r.line(field); !ok && !r.bad[line] {
		r.add(line, field, msg, hint)
	}
}

func (r *reader) err() error { return errors.Join(r.errs...) }

var yamlLine = regexp.MustCompile(`^line (\d+): (.*)$`)

// goType is how the decoder names our structs; people know the YAML only.
var goType = regexp.MustCompile(` (?:in|into) type \S+| into \S+$`)

// hasTwice says that a key was given twice, of which the decoder takes neither.
func hasTwice(err error) bool {
	return err != nil && strings.Contains(err.Error(), "already defined")
}

// addYAML takes the decoder's error apart.
func (r *reader) addYAML(err error) {
	if err == nil {
		return
	}
	lines := []string{err.Error()}
	var typed *yaml.TypeError
	if errors.As(err, &typed) {
		lines = lines[:0]
		for _, e := range typed.Errors {
			lines = append(lines, fmt.Sprint(e))
		}
	}
	for _, l := range lines {
		line, msg := 1, strings.TrimPrefix(l, "yaml: ") // the decoder does not name the first line
		if m := yamlLine.FindStringSubmatch(msg); m != nil {
			line, _ = strconv.Atoi(m[1])
			msg = m[2]
		}
		r.add(line, "", goType.ReplaceAllString(msg, ""), "compare it with the example configuration")
	}
}

// line finds the line of a field like spec.readers[1], or of the nearest thing around it that was
// written.
func (r *reader) line(field string) int {
	if len(r.root.Content) == 0 {
		return 0
	}
	n := r.root.Content[0]
	line := n.Line
	for _, part := range strings.FieldsFunc(field, func(c rune) bool { return c == '.' || c == '[' || c == ']' }) {
		next, at := child(n, part)
		if next == nil {
			break
		}
		n, line = next, at
	}
	return line
}

func child(n *yaml.Node, name string) (*yaml.Node, int) {
	if n.Kind == yaml.SequenceNode {
		if i, err := strconv.Atoi(name); err == nil && i < len(n.Content) {
			return n.Content[i], n.Content[i].Line
		}
		return nil, 0
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == name {
			return n.Content[i+1], n.Content[i].Line
		}
	}
	return nil, 0
}
