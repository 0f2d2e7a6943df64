package agent

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/sallyport-dev/sallyport/pkg/px"
)

// proxyListening tells whether a listener has the proxy's port in px, in either address family.
func proxyListening(ns *px.Namespace, port uint16) (bool, error) {
	found := false
	err := ns.Do(func() error {
		for _, name := range []string{"/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"} {
			f, err := os.Open(name)
			if err != nil {
				return err
			}
			found = found || listens(f, port)
			f.Close()
		}
		return nil
	})
	if err != nil {
		return false, fmt.Errorf("look for the proxy's listener: %w", err)
	}
	return found, nil
}

// listens looks for a listener of the port in a table of /proc/net/tcp's form (proc(5)). Listeners come before
// connections there, so it looks no further than the first connection.
func listens(table io.Reader, port uint16) bool {
	const stateListen = "0A"
	suffix := fmt.Sprintf(":%04X", port)
	lines := bufio.NewScanner(table)
	for header := true; lines.Scan(); header = false {
		fields := strings.Fields(lines.Text())
		if header {
			continue
		}
		if len(fields) < 4 || fields[3] != stateListen {
			return false
		}
		if strings.HasSuffix(fields[1], suffix) {
			return true
		}
	}
	return false
}
