package leak

import (
	"bufio"
	"io"
	"os/exec"
	"path/filepath"
	"testing"
)

// sharing is another process that has a part of the machine until it is told to end.
func sharing(t *testing.T, dir string) (end func()) {
	t.Helper()
	cmd := exec.Command("flock", "--shared", filepath.Join(dir, "sallyport-test.lock"), "sh", "-c", "echo here; read -r _")
	in, inErr := cmd.StdinPipe()
	out, outErr := cmd.StdoutPipe()
	if inErr != nil || outErr != nil {
		t.Fatal(inErr, outErr)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatalf("%q, %v", line, err)
	}
	return func() {
		_, _ = io.WriteString(in, "\n")
		_ = cmd.Wait()
	}
}

// TestAlone: processes have the machine side by side, until one wants it alone: it waits for those that are there, and new ones wait for it.
func TestAlone(t *testing.T) {
	dir := t.TempDir()
	end := sharing(t, dir)
	release, err := share(dir) // beside the other
	if err != nil {
		t.Fatal(err)
	}
	again, err := share(dir)
	if err != nil {
		t.Fatal(err)
	}
	free := func(file, how string) bool {
		return exec.Command("flock", how, "--nonblock", filepath.Join(dir, file), "true").Run() == nil
	}
	ended, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- alone(func() {
			select {
			case <-ended:
			default:
				t.Error("alone although another process is there")
			}
			if free("sallyport-test.gate", "--shared") || free("sallyport-test.lock", "--shared") {
				t.Error("another process could come in")
			}
		})
	}()
	for free("sallyport-test.gate", "--shared") { // it has not come to the gate yet
	}
	if !free("sallyport-test.lock", "--shared") {
		t.Error("who waits keeps out who is there already")
	}
	close(ended)
	end()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if free("sallyport-test.lock", "--exclusive") || !free("sallyport-test.lock", "--shared") {
		t.Error("afterwards it is not shared")
	}
	again()
	if free("sallyport-test.lock", "--exclusive") {
		t.Error("the first part has ended with the second")
	}
	release()
	if !free("sallyport-test.lock", "--exclusive") || !free("sallyport-test.gate", "--exclusive") {
		t.Error("the turn is over, and locks are left")
	}
}
