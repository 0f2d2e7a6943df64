package store

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// disk is a small file system of the test's own, with a store on it that a killed process left.
type disk struct {
	t    *testing.T
	dir  string
	path string
}

func newDisk(t *testing.T, clean bool) *disk {
	t.Helper()
	d := &disk{t: t, dir: mountTmpfs(t, "1m")}
	d.path = filepath.Join(d.dir, "node.db")
	elsewhere := testPath(t)
	s := must(openSized(elsewhere, pages{most: maxPages, kept: keptPages}))(t)
	t.Cleanup(func() { s.Close() })
	if err := errors.Join(s.See(t.Context(), noon), s.Activate(t.Context(), at(noon), []byte("activated"))); err != nil {
		t.Fatal(err)
	}
	if clean {
		s.Close()
	}
	if err := os.CopyFS(d.dir, os.DirFS(filepath.Dir(elsewhere))); err != nil {
		t.Fatal(err)
	}
	return d
}

func mountTmpfs(t *testing.T, size string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// fill leaves no room at all.
func (d *disk) fill() {
	d.t.Helper()
	f := must(os.Create(filepath.Join(d.dir, "filler")))(d.t)
	defer f.Close()
	page := make([]byte, 4096)
	for {
		if _, err := f.Write(page); errors.Is(err, unix.ENOSPC) {
			return
		} else if err != nil {
			d.t.Fatal(err)
		}
	}
}

func (d *disk) empty() {
	d.t.Helper()
	if err := os.Remove(filepath.Join(d.dir, "filler")); err != nil {
		d.t.Fatal(err)
	}
}

func (d *disk) remount(flags uintptr) {
	d.t.Helper()
	if err := unix.Mount("", d.dir, "", unix.MS_REMOUNT|flags, ""); err != nil {
		d.t.Fatal(err)
	}
}

// A disk that takes nothing keeps nobody from reading what is there, lets nothing be added, and is made up for when it is
// back.
func TestDiskThatTakesNothing(t *testing.T) {
	for _, c := range []struct {
		name      string
		clean     bool // the process before stopped in good order: there is no log
		reboot    bool
		end, mend func(*disk)
		want      error
	}{
		{name: "full", end: (*disk).fill, mend: (*disk).empty, want: ErrFull},
		{name: "full after a stop", clean: true, end: (*disk).fill, mend: (*disk).empty, want: ErrFull},
		{name: "full after a reboot", reboot: true, end: (*disk).fill, mend: (*disk).empty, want: ErrFull},
		{name: "read-only", end: func(d *disk) { d.remount(unix.MS_RDONLY) }, mend: func(d *disk) { d.remount(0) }, want: ErrUnwritable},
		{name: "read-only after a stop", clean: true, end: func(d *disk) { d.remount(unix.MS_RDONLY) }, mend: func(d *disk) { d.remount(0) }, want: ErrUnwritable},
		{name: "read-only after a reboot", reboot: true, end: func(d *disk) { d.remount(unix.MS_RDONLY) }, mend: func(d *disk) { d.remount(0) }, want: ErrUnwritable},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, ctx := newDisk(t, c.clean), t.Context()
			if c.reboot {
				rebooted(t, d.path)
			}
			c.end(d)
			s := openTest(t, d.path)
			if err := s.Claim(ctx, Owner{Node: "a", Witness: filepath.Join(t.TempDir(), "witness")}); err != nil {
				t.Fatal(err)
			}
			id := at(noon).ID
			if active := must(s.ActiveGrants(ctx))(t); len(active) != 1 || active[0].ID != id || s.Memory().Latest != noon {
				t.Errorf("active grants are %v, the memory is %+v", active, s.Memory())
			}
			must(s.Flow(ctx))(t)
			if _, _, err := s.Unsettled(ctx); err != nil {
				t.Error(err)
			}
			for what, err := range map[string]error{"end": s.EndGrant(ctx, id, StateRevoked, "", []byte("ended")),
				"activation": s.Activate(ctx, at(noon.Add(time.Minute)), []byte("activated")), "catching up": s.CatchUp(ctx)} {
				if !errors.Is(err, c.want) {
					t.Errorf("%s: %v, want %v", what, err, c.want)
				}
			}
			c.mend(d)
			if err := errors.Join(s.EndGrant(ctx, id, StateRevoked, "", []byte("ended")), s.CatchUp(ctx)); err != nil {
				t.Fatal(err)
			}
			s.CountFlow(99)
			s.Close()
			s = openTest(t, d.path)
			if g, err := s.Grant(ctx, id); err != nil || g.State != StateRevoked {
				t.Errorf("the grant is %s, %v", g.State, err)
			}
			if flow := must(s.Flow(ctx))(t); flow.Produced != 99 {
				t.Errorf("flow numbers stand at %d", flow.Produced)
			}
			s.Close()
		})
	}
}

// Whoever reads while the disk is read-only holds nobody to that: what is written when it is back waits for them, and is.
func TestReaderWhenTheDiskIsBack(t *testing.T) {
	d, ctx := newDisk(t, true), t.Context()
	d.remount(unix.MS_RDONLY)
	s := openTest(t, d.path)
	reading := must(s.db.QueryContext(ctx, `SELECT 1 UNION ALL SELECT 2`))(t)
	defer reading.Close()
	if !reading.Next() {
		t.Fatal(reading.Err())
	}
	d.remount(0)
	written := make(chan error, 1)
	go func() { written <- s.See(ctx, noon.Add(time.Hour)) }()
	for deadline := time.After(10 * time.Second); s.db.Stats().WaitCount == 0; {
		select {
		case err := <-written:
			t.Fatalf("written beside the reader: %v", err)
		case <-deadline:
			t.Fatal("nobody waits")
		case <-time.After(time.Millisecond):
		}
	}
	if err := errors.Join(reading.Close(), <-written, s.See(ctx, noon.Add(2*time.Hour))); err != nil {
		t.Error(err)
	}
}

// A doubt that the disk does not take is one all the same, and stays when it does.
func TestDoubtOnAFullDisk(t *testing.T) {
	d, ctx := newDisk(t, true), t.Context()
	s := openTest(t, d.path)
	if err := s.Claim(ctx, Owner{Node: "a"}); err != nil {
		t.Fatal(err)
	}
	s.Close()
	d.fill()
	s = openTest(t, d.path)
	if err := s.Claim(ctx, Owner{Node: "b"}); err != nil || s.Memory().Doubt == "" {
		t.Fatalf("claimed by another: %v, doubt %q", err, s.Memory().Doubt)
	}
	d.empty()
	if err := s.CatchUp(ctx); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if s = openTest(t, d.path); s.Memory().Doubt == "" {
		t.Error("the doubt is forgotten")
	}
}

// The memory can be asked while a write waits for the disk.
func TestMemoryWaitsForNothing(t *testing.T) {
	s := openTest(t, testPath(t))
	s.mu.Lock()
	defer s.mu.Unlock()
	asked := make(chan Memory)
	go func() { asked <- s.Memory() }()
	select {
	case <-asked:
	case <-time.After(10 * time.Second):
		t.Fatal("it waits")
	}
}
