package agent

import (
	"errors"
	"os"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

// TestRollbackToNothing: where no other version was, that is said, and the log does not tell of a rollback.
func TestRollbackToNothing(t *testing.T) {
	in := install(t)
	must(t, makeDirs(in.cfg))
	if _, err := Rollback(t.Context(), Options{ConfigFile: in.config}, "test"); !errors.Is(err, datapath.ErrNoPrevious) {
		t.Errorf("rolled back: %v", err)
	}
	if _, err := os.Stat(storeFile(in.cfg)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something was recorded: %v", err)
	}
}
