package agent

import (
	"context"
	"errors"
	"fmt"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
)

// Rollback gives every hook the program of the version before, on the same tables: live connections go on. It is recorded
// first. The next start of an agent puts its own version's programs back; to stay, start the older one. The error wraps
// ErrRunning while the agent runs, and datapath.ErrNoPrevious when there was no other version. actor is told in the record.
func Rollback(ctx context.Context, o Options, actor string) (hooks int, err error) {
	cfg, err := o.config()
	if err != nil {
		return 0, err
	}
	l, err := takeLock(cfg.LockFile())
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, l.release()) }()
	if err := datapath.CanRollback(cfg.PinDir()); err != nil {
		return 0, fmt.Errorf("roll back: %w", err) // and nothing to record
	}
	s, _, err := openOrRecover(storeFile(cfg), bootClock(), o.logger())
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	event, err := encodeEvent(newEvent(stepRolledBack, actor, "rollback of the programs", bootClock()))
	if err == nil {
		err = s.KeepUrgent(ctx, nil, event)
	}
	if err != nil {
		return 0, fmt.Errorf("record rollback: %w", err)
	}
	if hooks, err = datapath.Rollback(cfg.PinDir(), cfg.PxPath()); err != nil {
		return hooks, fmt.Errorf("roll back: %w", err)
	}
	return hooks, nil
}
