package main

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/policy"
)

const head = "apiVersion: sallyport.dev/v1alpha1\nkind: CollectorConfig\nmetadata: {name: collector}\nspec:\n  trustDomain: example.org\n"

func TestDefaults(t *testing.T) {
	c, err := parseConfig("c.yaml", []byte(head))
	if err != nil {
		t.Fatal(err)
	}
	want := defaultSpec()
	want.TrustDomain, want.ID, want.retain = "example.org", "spiffe://example.org/sallyport/collector", 90*24*time.Hour
	if !reflect.DeepEqual(c.Spec, want) {
		t.Errorf("have %+v, want %+v", c.Spec, want)
	}
}

// The example says the defaults, as its comments claim.
func TestExample(t *testing.T) {
	const name = "../../deploy/examples/collector.yaml"
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	c, err := parseConfig(name, data)
	if err != nil {
		t.Fatal(err)
	}
	want := defaultSpec()
	want.TrustDomain, want.ID, want.retain = "example.org", "spiffe://example.org/sallyport/collector", 90*24*time.Hour
	want.Readers, want.Actors, want.Metrics = []string{"spiffe://example.org/ops/*"}, []string{}, "127.0.0.1:9470"
	want.Console = consoleSpec{Listen: ":8443"}
	if !reflect.DeepEqual(c.Spec, want) {
		t.Errorf("have %+v, want %+v", c.Spec, want)
	}
}

func TestWrongConfig(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		want []string // beginnings of the problems, in order
	}{
		"empty":           {"", []string{"c.yaml: is empty"}},
		"no YAML":         {"a: b: c", []string{"c.yaml:1: mapping values are not allowed"}},
		"unknown key":     {head + "  lisen: x\n", []string{"c.yaml:6: field lisen not found"}},
		"key twice":       {head + "  retain: 48h\n  retain: 72h\n", []string{`c.yaml:7: mapping key "retain" already defined`}},
		"two documents":   {head + "---\n" + head, []string{"c.yaml: has more than one document"}},
		"other kind":      {strings.Replace(head, "CollectorConfig", "AgentConfig", 1), []string{"c.yaml:2: kind: want CollectorConfig"}},
		"other version":   {strings.Replace(head, "v1alpha1", "v2", 1), []string{"c.yaml:1: apiVersion: want sallyport.dev/v1alpha1"}},
		"trust domain":    {strings.Replace(head, "example.org", "'a b'", 1), []string{`c.yaml:5: spec.trustDomain: "a b" is no trust domain`}},
		"no spec":         {"apiVersion: sallyport.dev/v1alpha1\nkind: CollectorConfig\n", []string{`c.yaml:1: spec.trustDomain: "" is no trust domain`}},
		"foreign id":      {head + "  id: spiffe://other.org/x\n", []string{"c.yaml:6: spec.id"}},
		"port 0":          {head + "  listen: ':0'\n", []string{"c.yaml:6: spec.listen"}},
		"no port":         {head + "  listen: localhost\n", []string{"c.yaml:6: spec.listen"}},
		"workload API":    {head + "  workloadAPI: /run/spire.sock\n", []string{"c.yaml:6: spec.workloadAPI"}},
		"relative":        {head + "  dataDir: data\n  socket: sock\n", []string{"c.yaml:6: spec.dataDir", "c.yaml:7: spec.socket"}},
		"database":        {head + "  postgres: {url: 'postgres://x:secret@h:port/'}\n", []string{"c.yaml:6: spec.postgres.url: is no address of a database"}},
		"password":        {head + "  postgres: {url: 'postgres://x:secret@h/d'}\n", []string{"c.yaml:6: spec.postgres.url: has a password"}},
		"password's key":  {head + "  postgres: {url: 'host=h sslpassword = secret'}\n", []string{"c.yaml:6: spec.postgres.url: has a password"}},
		"two databases":   {head + "  postgres: {url: 'host=h', urlFile: /f}\n", []string{"c.yaml:6: spec.postgres.urlFile: stands beside"}},
		"database's file": {head + "  postgres:\n    urlFile: f\n", []string{`c.yaml:7: spec.postgres.urlFile: "f" is no absolute path`}},
		"retain":          {head + "  retain: 1h\n", []string{"c.yaml:6: spec.retain: 1h is less than a day"}},
		"no duration":     {head + "  retain: ninety\n", []string{`c.yaml:6: spec.retain: "ninety" is not a duration`}},
		"readers":         {head + "  readers:\n    - spiffe://example.org/a\n    - 'spiffe://*'\n    - bob\n", []string{"c.yaml:8: spec.readers[1]", "c.yaml:9: spec.readers[2]"}},
		"actors":          {head + "  actors:\n    - spiffe://example.org/a\n    - 'spiffe://*'\n    - bob\n", []string{"c.yaml:8: spec.actors[1]", "c.yaml:9: spec.actors[2]"}},
		"nobody":          {head + "  operators: {uids: []}\n", []string{"c.yaml:6: spec.operators.uids"}},
		"uid":             {head + "  operators: {uids: [root]}\n", []string{"c.yaml:6: cannot unmarshal"}},
		"metrics":         {head + "  metrics: '9470'\n", []string{`c.yaml:6: spec.metrics: "9470" is no address with a port`}},
		"console":         {head + "  console:\n    listen: '8443'\n    certificate: web.pem\n", []string{"c.yaml:7: spec.console.listen: ", "c.yaml:8: spec.console.certificate: ", "c.yaml:6: spec.console: "}},
		"no console":      {head + "  console:\n    certificate: /web.pem\n    key: /web.key\n", []string{"c.yaml:6: spec.console: there is a certificate, and no address"}},
		"limits":          {head + "  limits:\n    recordsPerSecond: -1\n    bytesPerSecond: -2\n", []string{"c.yaml:7: spec.limits.recordsPerSecond: ", "c.yaml:8: spec.limits.bytesPerSecond: "}},
		"several at once": {head + "  listen: x\n  lisen: y\n  retain: 1s\n", []string{"c.yaml:7: field lisen", "c.yaml:6: spec.listen", "c.yaml:8: spec.retain"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parseConfig("c.yaml", []byte(c.text))
			var got []string
			for _, e := range policy.Errors(err) {
				got = append(got, e.Error())
			}
			if len(got) != len(c.want) {
				t.Fatalf("have %q, want %q", got, c.want)
			}
			for i := range got {
				if !strings.HasPrefix(got[i], c.want[i]) || strings.Contains(got[i], "secret") {
					t.Errorf("have %q, want %q", got[i], c.want[i])
				}
			}
		})
	}
}

func TestOverride(t *testing.T) {
	c, err := parseConfig("c.yaml", []byte(head+"  retain: 0s\n"))
	if err != nil {
		t.Fatal(err)
	}
	override{listen: "127.0.0.1:1", dataDir: "/d"}.apply(&c)
	if c.Spec.Listen != "127.0.0.1:1" || c.Spec.DataDir != "/d" || c.Spec.Socket != defaultSpec().Socket || c.Spec.retain != 0 {
		t.Errorf("have %+v", c.Spec)
	}
}

// A database's address comes from the file as it is, and no error shows what is in it.
func TestDatabase(t *testing.T) {
	path := filepath.Join(t.TempDir(), "url")
	for text, want := range map[string]string{
		"":                                     "it is empty",
		"postgres://x:secret@h:port/":          "is neither",
		"host=h password=secret sslmode=never": "is neither",
		"postgres://x:secret@h/d?sslmode=no\n": "is neither",
		"postgres://x:secret@h/d\n":            "",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := parseConfig("c.yaml", []byte(head+"  postgres: {urlFile: "+path+"}\n"))
		if err != nil {
			t.Fatal(err)
		}
		address, err := c.Spec.Postgres.address()
		if want == "" {
			if err != nil || address != strings.TrimSpace(text) || c.collector(nil, address, nil).Postgres != address {
				t.Errorf("%q: %q, %v", text, address, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
}

// An address without a password may stand in the configuration, whatever else it has.
func TestAddressWithoutPassword(t *testing.T) {
	for _, url := range []string{"postgres://sally@db.example.org:5432/records?sslmode=verify-full", "postgres://db/d?host=/run/postgresql", "host=h user=u dbname=d passfile=/p"} {
		if _, err := parseConfig("c.yaml", []byte(head+"  postgres: {url: '"+url+"'}\n")); err != nil {
			t.Errorf("%s: %v", url, err)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte(head))
	f.Add([]byte("a: &x [*x]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := parseConfig("c.yaml", data)
		if err == nil { // what was accepted can be used
			c.id()
			c.trustDomain()
		}
	})
}
