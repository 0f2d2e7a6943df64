package lab

import (
	"os"
	"strconv"
	"time"
)

// SlownessVariable names the environment variable that says how many times slower this machine is than a real one.
// Tests in emulation have it.
const SlownessVariable = "SALLYPORT_SLOWNESS"

// Bound is how long a test may wait for what takes at most d on a real machine.
func Bound(d time.Duration) time.Duration {
	if n, err := strconv.Atoi(os.Getenv(SlownessVariable)); err == nil && n > 1 {
		return d * time.Duration(n)
	}
	return d
}
