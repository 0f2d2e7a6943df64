package collector

import (
	"bytes"
	"database/sql"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// The key comes with the directory and stays with it. Records are not gone on with under another one.
func TestLogKey(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "days")
	i := newIDs(t)
	run := func() *running { return start(t, i, func(c *Config) { c.Dir = dir }) }
	r := run()
	first := r.write.key.vkey
	if !strings.HasPrefix(first, "example.org/sallyport/log/") {
		t.Errorf("key is %s", first)
	}
	path := filepath.Join(dir, keyFile)
	if mode := must(os.Stat(path))(t).Mode().Perm(); mode != 0o600 {
		t.Errorf("mode of the key is %#o", mode)
	}
	if mode := must(os.Stat(filepath.Join(dir, publicKeyFile)))(t).Mode().Perm(); mode != 0o644 {
		t.Errorf("mode of the public half is %#o", mode)
	}
	r.stop()
	if r = run(); r.write.key.vkey != first {
		t.Errorf("the key is another one after a start")
	}
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(flows, flowEntries(1, 2)...)
	r.stop()

	text := must(os.ReadFile(path))(t)
	other := start(t, i, nil)
	for name, c := range map[string]struct {
		key  []byte
		want string
	}{
		"gone":           {nil, "put the key back"},
		"of another log": {must(os.ReadFile(filepath.Join(other.cfg.Dir, keyFile)))(t), "not the key of these records"},
		"cut off":        {text[:len(text)/2], keyFile},
		"two keys":       {[]byte(strings.SplitAfter(string(text), "\n")[0] + other.write.key.vkey + "\n"), "different keys"},
	} {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if c.key != nil {
			if err := os.WriteFile(path, c.key, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := New(r.cfg); err == nil || !strings.Contains(err.Error(), c.want) {
			if err == nil {
				got.Close()
			}
			t.Errorf("%s: %v", name, err)
		}
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r = run()
	n, w := r.connect(t, "node-1", epoch1)
	if w.GetFlowSeq() != 2 {
		t.Errorf("welcome: %v", w)
	}
	n.store(flows, flowEntries(3, 4)...)
}

// A key that is gone is not made anew where only files are left that a log was in: a second log would look like a forged one.
func TestLogKeyIsNotMadeAnew(t *testing.T) {
	r := start(t, newIDs(t), nil)
	n, _ := r.connect(t, "node-1", epoch1)
	n.store(flows, flowEntries(1, 2)...)
	day := r.files().all()[0].path
	r.stop()
	if err := os.Remove(filepath.Join(r.cfg.Dir, keyFile)); err != nil {
		t.Fatal(err)
	}
	refused := func(what string) {
		t.Helper()
		if got, err := New(r.cfg); err == nil || !strings.Contains(err.Error(), "put the key back") {
			if err == nil {
				got.Close()
			}
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := os.Rename(day, day+damagedMark+"1"); err != nil {
		t.Fatal(err)
	}
	public := filepath.Join(r.cfg.Dir, publicKeyFile)
	text := must(os.ReadFile(public))(t)
	if err := os.Remove(public); err != nil {
		t.Fatal(err)
	}
	refused("a day that was set aside")
	if err := os.Remove(day + damagedMark + "1"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(public, text, 0o644); err != nil {
		t.Fatal(err)
	}
	refused("the public half")
	if err := os.Remove(public); err != nil {
		t.Fatal(err)
	}
	start(t, r.ids, func(c *Config) { *c = r.cfg }) // nothing is left of the log
}

// The public half is written where it is missing or another one, and is left alone where it is right.
func TestPublicHalf(t *testing.T) {
	r := start(t, newIDs(t), nil)
	path := filepath.Join(r.cfg.Dir, publicKeyFile)
	right, was := must(os.ReadFile(path))(t), must(os.Stat(path))(t)
	again := func() {
		t.Helper()
		r.stop()
		r = start(t, r.ids, func(c *Config) { *c = r.cfg })
		if text := must(os.ReadFile(path))(t); !bytes.Equal(text, right) {
			t.Errorf("public half is %q", text)
		}
	}
	again()
	if !os.SameFile(was, must(os.Stat(path))(t)) {
		t.Error("it was written again")
	}
	if err := os.WriteFile(path, []byte("other\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	again()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	again()
}

// Days of the layout before are not touched, and the sentence says what to do.
func TestOlderLayout(t *testing.T) {
	dir := t.TempDir()
	db := must(sql.Open("sqlite", filepath.Join(dir, "2026-03-01.db")))(t)
	for _, q := range []string{"CREATE TABLE marks (node TEXT)", "PRAGMA user_version = 1"} {
		must(db.Exec(q))(t)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	c := Config{Dir: dir, TrustDomain: domain, Source: newIDs(t).of("/sallyport/collector"), Listen: "127.0.0.1:0"}
	if got, err := New(c); err == nil || !strings.Contains(err.Error(), "layout 1") || !strings.Contains(err.Error(), "move the directory's records away") {
		if err == nil {
			got.Close()
		}
		t.Errorf("error is %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, keyFile)); !os.IsNotExist(err) {
		t.Errorf("a key was made: %v", err)
	}
}

// A log does not go on from hashes that are not those of its checkpoint: the day is set aside.
func TestForeignHead(t *testing.T) {
	for name, change := range map[string]string{
		"hash":        `UPDATE hashes SET hash = zeroblob(32) WHERE idx = (SELECT max(idx) FROM hashes)`,
		"gone":        `DELETE FROM hashes WHERE idx = (SELECT max(idx) FROM hashes)`,
		"size":        `UPDATE head SET size = 2`,
		"no head":     `DELETE FROM head`,
		"mark's seal": `UPDATE marks SET seal = CAST(CAST(seal AS TEXT) || 'x' AS BLOB)`,
		"seal gone":   `UPDATE marks SET seal = x''`,
		"number":      `UPDATE marks SET number = number + 1`,
		"key":         `UPDATE keys SET vkey = replace(vkey, 'A', 'B')`,
		"no key":      `DELETE FROM keys`,
		"checkpoint":  `UPDATE head SET checkpoint = CAST(CAST(checkpoint AS TEXT) || 'x' AS BLOB)`,
	} {
		t.Run(name, func(t *testing.T) {
			at := &clock{t: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}
			r := start(t, newIDs(t), func(c *Config) { c.Now, c.Boot = at.now, at.boot })
			for day := range uint64(2) {
				n, _ := r.connect(t, "node-1", epoch1)
				n.store(flows, flowEntry(2*day+1, nil))
				n.store(flows, flowEntry(2*day+2, nil))
				at.pass(24 * time.Hour)
			}
			path := r.files().all()[1].path
			r.stop()
			db := must(sql.Open("sqlite", path))(t)
			must(db.Exec(change))(t)
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
			r = start(t, r.ids, func(c *Config) { *c = r.cfg })
			n, w := r.connect(t, "node-1", epoch1)
			if w.GetFlowSeq() != 2 {
				t.Fatalf("welcome: %v", w)
			}
			n.chains[flows].number = 4
			n.store(flows, forgotten(4, 2), flowEntry(5, nil))
			if got, err := proven(r.evidence(t, &api.EvidenceRequest{}), r.logKeyOf(t)); err != nil || len(got) != 4 {
				t.Errorf("%d entries are proven: %v", len(got), err)
			}
		})
	}
}
