package main

import (
	"fmt"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// machine is where the figures were taken.
type machine struct {
	CPU     string `json:"cpu"`
	Cores   int    `json:"cores"`
	Kernel  string `json:"kernel"`
	Virtual bool   `json:"virtual"`
	Load    string `json:"load"` // the three averages when the run began
}

func thisMachine() machine {
	m := machine{Cores: runtime.NumCPU(), CPU: "unknown processor"}
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	info, _ := os.ReadFile("/proc/cpuinfo") // without it the processor stays unknown
	for line := range strings.Lines(string(info)) {
		key, value, _ := strings.Cut(line, ":")
		switch value = strings.TrimSpace(value); strings.TrimSpace(key) {
		case "model name":
			m.CPU = value
		case "flags":
			m.Virtual = strings.Contains(" "+value+" ", " hypervisor ")
		}
	}
	load, _ := os.ReadFile("/proc/loadavg")
	if fields := strings.Fields(string(load)); len(fields) > 3 {
		m.Load = strings.Join(fields[:3], " ")
	}
	return m
}

// String describes the machine in words.
func (m machine) String() string {
	kind := "a machine"
	if m.Virtual {
		kind = "a virtual machine"
	}
	return fmt.Sprintf("%s with %d cores (%s), Linux %s, load %s at the start", kind, m.Cores, m.CPU, m.Kernel, m.Load)
}
