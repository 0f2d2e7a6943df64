package store

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A kill between any two steps: the next start finds damage, goes on from there, and ends where it would have ended. Nothing
// of the damaged files is lost on the way, and nothing is told twice.
func TestRecoverStopped(t *testing.T) {
	path := testPath(t)
	w := fillAll(t, path)
	steps := len(replaceSteps(path, ""))
	for done := range steps + 1 {
		p := damagedCopy(t, path, func(db []byte) []byte { return db[:len(db)/2] })
		if s, err := Open(p); !errors.Is(err, ErrDamaged) {
			t.Fatal(s, err)
		}
		damaged := must(os.ReadFile(p))(t)
		r := must(begin(p, pages{most: maxPages, kept: keptPages}, tell))(t)
		for _, step := range replaceSteps(p, r.Epoch)[:done] {
			if err := step(); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := os.Stat(p + sufNext + r.Epoch); err == nil {
			if s, err := Open(p); !errors.Is(err, ErrDamaged) {
				t.Fatalf("after %d steps: %v, %v", done, s, err)
			}
			again := must(Recover(p, tell))(t)
			if again.Epoch != r.Epoch || again.File != r.File {
				t.Errorf("after %d steps another store follows: %+v, not %+v", done, again, r)
			}
		}
		if kept, err := os.ReadFile(r.File); err != nil || !bytes.Equal(kept, damaged) {
			t.Errorf("after %d steps the damaged file is not kept as it was: %d bytes of %d, %v", done, len(kept), len(damaged), err)
		}
		if w.survives(t, openTest(t, p), r); t.Failed() {
			t.Fatalf("stopped after %d steps", done)
		}
	}
}

const recoverEnv = childEnv + "_RECOVER"

// recoverLoudly is a child that says when it is done.
func recoverLoudly(path string) error {
	s, err := Open(path)
	if errors.Is(err, ErrDamaged) {
		if _, err = Recover(path, tell); err == nil {
			s, err = Open(path)
		}
	}
	if err == nil {
		fmt.Println("recovered")
		err = s.Close()
	}
	return err
}

// A disk that fails to read once is not a damaged store: it is read again before anything is set aside.
func TestReadFailsOnce(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace, which has a read fail, is not installed")
	}
	path := testPath(t)
	w := fillAll(t, path)
	log := filepath.Join(t.TempDir(), "calls")
	child := exec.Command(strace, "-f", "-qq", "-o", log, "-P", path,
		"-e", "trace=pread64", "-e", "inject=pread64:error=EIO:when=2", os.Args[0])
	child.Env = append(os.Environ(), childEnv+"="+path, recoverEnv+"=1")
	if out, err := child.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	calls := must(os.ReadFile(log))(t)
	if n := bytes.Count(calls, []byte("EIO")); n != 1 {
		t.Errorf("%d reads failed", n)
	}
	if kept := must(filepath.Glob(path + sufDamaged + "*"))(t); len(kept) > 0 {
		t.Errorf("set aside were %v", kept)
	}
	if now := whatIs(t, openTest(t, path)); !reflect.DeepEqual(now, w) {
		t.Error("the store is another")
	}
}

// Kills at any moment, time after time, until one start comes through.
func TestRecoverKilled(t *testing.T) {
	rounds := 10
	if text := os.Getenv(killsEnv); text != "" {
		rounds = must(strconv.Atoi(text))(t)
	}
	path := testPath(t)
	w := fillAll(t, path)
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	killed := 0
	for round := range rounds {
		p := damagedCopy(t, path, func(db []byte) []byte { clear(db[rng.IntN(len(db)/pageSize)*pageSize:][:pageSize]); return db })
		damaged := must(os.ReadFile(p))(t)
		for tries := 0; ; tries++ {
			c := startRecovery(t, p)
			if tries < 5 {
				<-time.After(time.Duration(rng.IntN(60)) * time.Millisecond) // the random moment
			} else {
				c.waitLines(t, 1)
			}
			if slices.Contains(c.kill(t), "recovered") {
				break
			}
			killed++
		}
		kept := must(filepath.Glob(p + sufDamaged + "*"))(t)
		s := openTest(t, p)
		if len(kept) == 0 {
			if now := whatIs(t, s); !reflect.DeepEqual(now, w) {
				t.Errorf("round %d: damaged, and nobody noticed", round)
			}
			continue
		}
		if !bytes.Equal(must(os.ReadFile(p+sufDamaged+s.Epoch()))(t), damaged) {
			t.Errorf("round %d: the damaged file is not kept: %v", round, kept)
		}
		entries := must(s.Entries(t.Context(), 0, 1<<20))(t)
		r := Recovered{File: p + sufDamaged + s.Epoch(), Epoch: s.Epoch(), Entries: len(entries) - 1}
		if n := len(entries); n > 1 && string(entries[n-2].Data) == "lost" {
			r.Lost, r.Entries = entries[n-2].Seq, n-2
		}
		if w.survives(t, s, r); t.Failed() {
			t.Fatalf("in round %d", round)
		}
	}
	t.Logf("%d rounds, %d kills", rounds, killed)
}

// A disk that is full has what was kept for people. One that takes nothing says so, and the damaged file stays in its place.
func TestRecoverOnADiskThatTakesNothing(t *testing.T) {
	path := testPath(t)
	w := fillAll(t, path)
	for name, c := range map[string]struct {
		kept bool
		end  func(*disk)
		want error
	}{
		"full, with something kept": {true, (*disk).fill, nil},
		"full":                      {false, (*disk).fill, ErrFull},
		"read-only":                 {false, func(d *disk) { d.remount(unix.MS_RDONLY) }, ErrUnwritable},
	} {
		t.Run(name, func(t *testing.T) {
			d := &disk{t: t, dir: mountTmpfs(t, "8m")}
			d.path = filepath.Join(d.dir, "node.db")
			db := must(os.ReadFile(path))(t)
			err := errors.Join(os.WriteFile(d.path, db[:len(db)/2], 0o600), os.WriteFile(d.path+"-count", must(os.ReadFile(path+"-count"))(t), 0o600))
			if c.kept {
				err = errors.Join(err, os.WriteFile(d.path+"-kept", make([]byte, keptBytes), 0o600))
			}
			if err != nil {
				t.Fatal(err)
			}
			c.end(d)
			if s, err := Open(d.path); !errors.Is(err, ErrDamaged) {
				t.Fatal(s, err)
			}
			r, err := Recover(d.path, tell)
			if !errors.Is(err, c.want) {
				t.Fatalf("recovered: %+v, %v", r, err)
			}
			if err != nil {
				if got := must(os.ReadFile(d.path))(t); !bytes.Equal(got, db[:len(db)/2]) {
					t.Error("the damaged file is another")
				}
				return
			}
			w.survives(t, openTest(t, d.path), r)
		})
	}
}

// Somebody vouches for what was recovered: then it is a store like any other, and its used grants stay used.
func TestVouchForTheRecovered(t *testing.T) {
	path := testPath(t)
	w := fillAll(t, path)
	s, r := mended(t, damagedCopy(t, path, func(db []byte) []byte {
		return bytes.Replace(db, []byte("entry number 20"), []byte("entry number 99"), 1)
	}))
	if r == nil {
		t.Fatal("nobody noticed")
	}
	ctx := t.Context()
	if err := errors.Join(s.Claim(ctx, Owner{Node: "a"}), s.Vouch(ctx, Owner{Node: "a"}, noon, noon, []byte("vouched"))); err != nil {
		t.Fatal(err)
	}
	for _, g := range w.used {
		g.Activated = noon
		if err := s.Activate(ctx, g, nil); !errors.Is(err, ErrReplayed) {
			t.Errorf("grant %s can be used again: %v", g.ID, err)
		}
	}
	fresh := at(noon.Add(time.Minute))
	fresh.NotAfter = noon.Add(time.Hour)
	if err := s.Activate(ctx, fresh, []byte("activated")); err != nil {
		t.Error(err)
	}
	s.Close()
	if again := openTest(t, s.path); again.Memory().Floor != noon || again.Epoch() != r.Epoch {
		t.Errorf("memory %+v", again.Memory())
	}
	if _, err := os.Stat(s.path + sufBegun); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("something is left of the work: %v", err)
	}
}
