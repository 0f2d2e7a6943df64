package audit

import (
	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// Causes of a difference between the kernel's counters and the records of a path.
const (
	TideCountedLoss = "counted_loss" // records of it were counted as lost
	TideMoving      = "moving"       // it was read while packets went
	TideUnexplained = "unexplained"
)

// TideEntry makes the critical entry of a tide, for the store.
func TideEntry(t *api.Tide) ([]byte, error) {
	return proto.Marshal(&api.Entry{Record: &api.Entry_Tide{Tide: t}})
}
