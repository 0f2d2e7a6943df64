package e2e_test

import (
	"os"
	"strconv"
	"time"
)

// slownessVariable names the environment variable that says how many times slower this machine is than a real one.
// Tests in emulation have it.
const slownessVariable = "SALLYPORT_SLOWNESS"

// bound is how long a test may wait for what takes at most d on a real machine.
func bound(d time.Duration) time.Duration {
	if n, err := strconv.Atoi(os.Getenv(slownessVariable)); err == nil && n > 1 {
		return d * time.Duration(n)
	}
	return d
}
