package datapath_test

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

const (
	// instructionLimit is what the verifier gives up at (BPF_COMPLEXITY_LIMIT_INSNS); a program takes half
	// of it at most, since other kernels walk other ways.
	instructionLimit = 1_000_000
	// margin is how many percent a program may grow or shrink before the baseline has to say so.
	margin       = 10
	baselineFile = "testdata/instructions.golden"
)

// cost is what the verifier had to do for a program, and how large it is then.
type cost struct{ verified, peakStates, translated int }

// verifierCosts loads every program and reads the verifier's own account.
func verifierCosts(t *testing.T) map[string]cost {
	t.Helper()
	spec := loadSpec(t)
	for _, m := range spec.Maps { // the verifier does not ask how much fits
		switch m.Type {
		case ebpf.Hash, ebpf.LRUHash, ebpf.LRUCPUHash, ebpf.PerCPUHash:
			m.MaxEntries = 64
		case ebpf.RingBuf:
			m.MaxEntries = uint32(os.Getpagesize())
		}
		m.Pinning = ebpf.PinNone
	}
	c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Programs: ebpf.ProgramOptions{LogLevel: ebpf.LogLevelStats}})
	check(t, err)
	t.Cleanup(c.Close)
	costs := map[string]cost{}
	for name, p := range c.Programs {
		info, err := p.Info()
		check(t, err)
		size, err := info.TranslatedSize()
		check(t, err)
		n := regexp.MustCompile(`processed (\d+) insns .* peak_states (\d+)`).FindStringSubmatch(p.VerifierLog)
		if n == nil {
			t.Fatalf("%s: no account in the verifier's log %q", name, p.VerifierLog)
		}
		verified, _ := strconv.Atoi(n[1])
		peak, _ := strconv.Atoi(n[2])
		costs[name] = cost{verified, peak, size / 8}
	}
	return costs
}

func (c cost) String() string { return fmt.Sprintf("%d %d %d", c.verified, c.peakStates, c.translated) }

// release is the kernel's version without what distributions add: "6.18".
func release(t *testing.T) string {
	t.Helper()
	var u unix.Utsname
	check(t, unix.Uname(&u))
	return regexp.MustCompile(`^\d+\.\d+`).FindString(unix.ByteSliceToString(u.Release[:]))
}

// TestInstructionCounts holds every program to half the verifier's limit, and to the baseline of the kernel
// that it was recorded on. make insns prints the counts, make insns UPDATE=1 records them.
func TestInstructionCounts(t *testing.T) {
	needsRoot(t)
	costs := verifierCosts(t)
	var lines []string
	for name, c := range costs {
		lines = append(lines, name+" "+c.String())
		if c.verified > instructionLimit/2 {
			t.Errorf("%s: the verifier walks %d instructions, at most %d are agreed", name, c.verified, instructionLimit/2)
		}
	}
	slices.Sort(lines)
	text := fmt.Sprintf("kernel %s\nprogram verified peak_states translated\n%s\n", release(t), strings.Join(lines, "\n"))
	t.Log("\n" + text)
	if *update {
		check(t, os.WriteFile(baselineFile, []byte(text), 0o644))
	}
	baseline, err := os.ReadFile(baselineFile)
	check(t, err)
	compareCosts(t, costs, string(baseline))
}

// compareCosts says nothing of another kernel's baseline, but that every program is in it.
func compareCosts(t *testing.T, costs map[string]cost, baseline string) {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(baseline), "\n")
	same, recorded := lines[0] == "kernel "+release(t), map[string]int{}
	for i, line := range lines[min(2, len(lines)):] {
		var name string
		var was cost
		if _, err := fmt.Sscan(line, &name, &was.verified, &was.peakStates, &was.translated); err != nil {
			t.Fatalf("%s, line %d: %q is no program and its three numbers: make insns UPDATE=1", baselineFile, i+3, line)
		}
		recorded[name] = was.verified
	}
	for name, c := range costs {
		was := recorded[name]
		if was == 0 || same && abs(c.verified-was)*100 > was*margin {
			t.Errorf("%s: %d verified instructions, %d in %s: if it is meant, make insns UPDATE=1", name, c.verified, was, baselineFile)
		}
		delete(recorded, name)
	}
	for name := range recorded {
		t.Errorf("%s is in %s, but there is no such program", name, baselineFile)
	}
}

func abs(n int) int { return max(n, -n) }

func needsRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: programs are loaded")
	}
}
