package identity

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Workload names whose identity is asked for: exactly one of its fields is set.
type Workload struct {
	// PodUID of the Kubernetes pod.
	PodUID string
	// PID of a process in the PID namespace of this process. A number alone names nobody for long: Watch pins
	// the process, and whoever learnt the number earlier has pinned it then and checks his Pin in tell.
	PID int32
}

// String names it as logs and errors do.
func (w Workload) String() string {
	if w.PodUID != "" {
		return "pod " + w.PodUID
	}
	return fmt.Sprintf("process %d", w.PID)
}

func (w Workload) check() error {
	if (w.PodUID == "") == (w.PID == 0) || w.PID < 0 {
		return errors.New("name a workload by either its pod or its process, and one of them")
	}
	return nil
}

// Attested is all that a broker tells of a workload. Each one replaces the one before in whole.
type Attested struct {
	// IDs it may act as, in the broker's order. Empty unless the state is fresh or stale-valid.
	IDs []spiffeid.ID
	// SVIDs of these, with private keys, in the same order.
	SVIDs []*x509svid.SVID
	// Bundles of its own and of federated trust domains.
	Bundles x509bundle.Source
	// State tells how far IDs can be relied on. Only a broker that was reached and denied makes it unissued
	// or withdrawn; one that is away leaves stale-valid what was valid, until that expires.
	State State
	// Err is the last trouble with the broker; nil while it is connected and renews.
	Err error
}

// Broker tells who other processes are. Its two implementations are those of the SPIFFE Broker API and of
// SPIRE's Delegated Identity API.
type Broker interface {
	// Watch calls tell with what is known of w, at every change of it, from one goroutine. It returns nil when
	// ctx ends and ErrEnded when the workload does, after a last call of tell that takes all away; any
	// other error is of a kind that asking again does not cure. While the broker is away it goes on.
	Watch(ctx context.Context, w Workload, tell func(Attested)) error
}

// BrokerConfig of a broker's client. Only Address must be set.
type BrokerConfig struct {
	// Address of the broker: "unix:///run/spire/sockets/broker.sock".
	Address string
	// Confirm, MinRetry, MaxRetry and Clock as in Config.
	Confirm            Confirm
	MinRetry, MaxRetry time.Duration
	Clock              func() time.Time
	Logger             *slog.Logger
}
