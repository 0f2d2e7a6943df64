package e2e_test

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/test/lab"
)

// onOwnDisk puts a directory on a file system of its own, which somebody can fill.
func (w *world) onOwnDisk(t *testing.T, dir string) {
	t.Helper()
	must(t, os.MkdirAll(dir, 0o700))
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=48m,mode=0700"))
	t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
}

// fillDisk takes what is left of it, until the file that it gives is removed.
func fillDisk(t *testing.T, dir string) (filler string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "filler"))
	must(t, err)
	defer f.Close()
	for page := make([]byte, 4096); err == nil; {
		_, err = f.Write(page)
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	return f.Name()
}

// flipIn flips the lowest bit of the last letter of a text, wherever it stands in the files: also in what is no longer used of them.
func flipIn(t *testing.T, files []string, text string) {
	t.Helper()
	flipped := []byte(text)
	flipped[len(flipped)-1] ^= 1
	found := false
	for _, path := range files {
		data, err := os.ReadFile(path)
		must(t, err)
		if bytes.Contains(data, []byte(text)) {
			found = true
			must(t, os.WriteFile(path, bytes.ReplaceAll(data, []byte(text), flipped), 0o600))
		}
	}
	if !found {
		t.Fatalf("%q is in none of %v", text, files)
	}
}

// flipAll flips a bit of each page of a file.
func flipAll(t *testing.T, path string) {
	t.Helper()
	data, err := os.ReadFile(path)
	must(t, err)
	for i := 0; i < len(data); i += 4096 {
		data[i] ^= 4
	}
	must(t, os.WriteFile(path, data, 0o600))
}

// has tells whether a text stands in one of the files.
func has(t *testing.T, files []string, text string) bool {
	t.Helper()
	return slices.ContainsFunc(files, func(path string) bool {
		data, err := os.ReadFile(path)
		return err == nil && bytes.Contains(data, []byte(text))
	})
}

func glob(t *testing.T, pattern ...string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(pattern...))
	must(t, err)
	return files
}

// Lengths in SQLite's write-ahead log: the header of the file, and that of each page.
const walHeader, frameHeader = 32, 24

// tearLog cuts a write-ahead log in the middle of the last page that was written to it, as a disk does that loses its power.
func tearLog(t *testing.T, path string) {
	t.Helper()
	data, err := os.ReadFile(path)
	must(t, err)
	if len(data) < walHeader+frameHeader {
		t.Fatalf("%s has %d bytes: nothing to tear", path, len(data))
	}
	page := int(binary.BigEndian.Uint32(data[8:]))
	salts, end := data[16:24], walHeader
	for next := end; next+frameHeader+page <= len(data) && bytes.Equal(data[next+8:next+16], salts); next += frameHeader + page {
		end = next
	}
	must(t, os.Truncate(path, int64(end+frameHeader+page/2)))
}

// tearEnd cuts the last bytes off of a file.
func tearEnd(t *testing.T, path string) {
	t.Helper()
	info, err := os.Stat(path)
	must(t, err)
	must(t, os.Truncate(path, info.Size()-10))
}

// clockCode stands for the vDSO's clock_gettime in a process whose clock was set: it asks the kernel, and adds to the wall clock what
// stands behind it, in seconds.
var clockCode = map[string][]byte{"amd64": {
	0xb8, 0xe4, 0, 0, 0, // mov $clock_gettime, %eax
	0x0f, 0x05, // syscall
	0x85, 0xff, // test %edi, %edi: another clock than CLOCK_REALTIME
	0x75, 10, // jne ret
	0x48, 0x8b, 0x0d, 6, 0, 0, 0, // mov seconds(%rip), %rcx
	0x48, 0x01, 0x0e, // add %rcx, (%rsi)
	0xc3, 0, 0, // ret
}}

// setClock sets the wall clock of one process, and of nobody else: a namespace of time has none. It writes to the process's own copy of
// the code that all programs read clocks by.
func setClock(t *testing.T, p *lab.Process, ahead time.Duration) {
	t.Helper()
	code := clockCode[runtime.GOARCH]
	if code == nil {
		t.Skipf("this kernel's code for clocks is not known to the test on %s", runtime.GOARCH)
	}
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", p.Pid()), os.O_RDWR, 0)
	must(t, err)
	defer mem.Close()
	start, end := clockFunction(t, mem, p.Pid())
	code = binary.LittleEndian.AppendUint64(slices.Clone(code), uint64(ahead/time.Second))
	if end-start < uint64(len(code)) {
		t.Fatalf("clock_gettime of the vDSO has %d bytes, the test needs %d", end-start, len(code))
	}
	waitUntil(t, "nobody to read the clock", func() bool {
		must(t, p.Signal(syscall.SIGSTOP))
		if !stoppedOutside(p.Pid(), start, end) {
			must(t, p.Signal(syscall.SIGCONT))
			return false
		}
		return true
	})
	_, err = mem.WriteAt(code, int64(start))
	must(t, errors.Join(err, p.Signal(syscall.SIGCONT)))
}

// clockFunction finds clock_gettime of the vDSO in a process.
func clockFunction(t *testing.T, mem io.ReaderAt, pid int) (start, end uint64) {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	must(t, err)
	var from, to uint64
	for line := range strings.Lines(string(maps)) {
		if strings.HasSuffix(strings.TrimSpace(line), "[vdso]") {
			_, err := fmt.Sscanf(line, "%x-%x", &from, &to)
			must(t, err)
		}
	}
	f, err := elf.NewFile(io.NewSectionReader(mem, int64(from), int64(to-from)))
	must(t, err)
	symbols, err := f.DynamicSymbols()
	must(t, err)
	for _, s := range symbols {
		if s.Name == "__vdso_clock_gettime" {
			return from + s.Value, from + s.Value + s.Size
		}
	}
	t.Fatalf("no clock_gettime among %d symbols of the vDSO", len(symbols))
	return 0, 0
}

// stoppedOutside tells whether every thread of a process is stopped, and none between two addresses.
func stoppedOutside(pid int, from, to uint64) bool {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil || len(threads) == 0 {
		return false
	}
	for _, thread := range threads {
		stat, err := os.ReadFile(thread + "/stat")
		if err != nil || !bytes.Contains(stat, []byte(") T ")) {
			return false
		}
		call, err := os.ReadFile(thread + "/syscall")
		fields := strings.Fields(string(call))
		if err != nil || len(fields) < 3 {
			return false
		}
		var at uint64
		if _, err := fmt.Sscanf(fields[len(fields)-1], "0x%x", &at); err != nil || from <= at && at < to {
			return false
		}
	}
	return true
}
