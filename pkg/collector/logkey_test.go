package collector

import (
	"database/sql"
	"os"
	"path/filepath"
	"strings"
	"testing"
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

// A log does not go on from hashes that are not those of its checkpoint.
func TestForeignHead(t *testing.T) {
	for name, change := range map[string]string{
		"hash": `UPDATE hashes SET hash = (SELECT hash FROM hashes WHERE idx = 0) WHERE idx = (SELECT max(idx) FROM hashes)`,
		"gone": `DELETE FROM hashes WHERE idx = (SELECT max(idx) FROM hashes)`,
		"size": `UPDATE head SET size = 2`,
	} {
		t.Run(name, func(t *testing.T) {
			r := start(t, newIDs(t), nil)
			n, _ := r.connect(t, "node-1", epoch1)
			for seq := range uint64(3) {
				n.store(flows, flowEntry(seq+1, nil))
			}
			path := r.days.all()[0].path
			r.stop()
			db := must(sql.Open("sqlite", path))(t)
			must(db.Exec(change))(t)
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
			if got, err := New(r.cfg); err == nil {
				got.Close()
				t.Error("the collector starts")
			} else if !strings.Contains(err.Error(), "the log") {
				t.Errorf("error is %v", err)
			}
		})
	}
}
