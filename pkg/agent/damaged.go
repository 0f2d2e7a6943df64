package agent

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/audit"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// openOrRecover opens the store in a file. A damaged one is set aside and what holds of it goes on, in doubt, with a record of
// what is gone; damage then says so in words, and is empty otherwise.
func openOrRecover(path string, c clock, log *slog.Logger) (s *store.Store, damage string, err error) {
	s, found := store.Open(path)
	if !errors.Is(found, store.ErrDamaged) {
		return s, "", found
	}
	r, err := store.Recover(path, func(r store.Recovered) ([]store.Item, error) { return damageRecords(r, found, c) })
	if err != nil {
		return nil, "", errors.Join(found, err)
	}
	log.Error("the store was damaged, and what holds of it goes on", "why", found, "kept as", r.File, "epoch", r.Epoch, "before", r.Before,
		"lost", r.Lost, "at most", r.Unsure, "broken", strings.Join(r.Broken, ", "))
	s, err = store.Open(path)
	if err != nil {
		return nil, "", fmt.Errorf("after its recovery: %w", err)
	}
	return s, s.Memory().Doubt, nil
}

// damageRecords are the critical records of what is gone, and of the damage.
func damageRecords(r store.Recovered, found error, c clock) (items []store.Item, err error) {
	if r.Lost > 0 {
		wall, _ := c.read()
		data, err := proto.Marshal(&api.Entry{Record: &api.Entry_Loss{Loss: &api.LossRecord{
			Stage: audit.StageAgentStore, Cause: audit.CauseDamaged, Count: r.Lost, To: timestamppb.New(wall), AtMost: r.Unsure,
		}}})
		if err != nil {
			return nil, err
		}
		items = append(items, store.Item{Data: data, Numbers: r.Lost})
	}
	event, err := encodeEvent(newEvent(stepAlarm, "agent", fmt.Sprintf("%s (1 times): %s", alarmStoreDamaged, damageText(r, found)), c))
	return append(items, store.Item{Data: event}), err
}

func damageText(r store.Recovered, found error) string {
	lost, before := fmt.Sprintf("%d critical records are gone", r.Lost), r.Before
	if r.Unsure {
		lost = fmt.Sprintf("at most %d critical records are gone", r.Lost)
	}
	if before == "" {
		before = "nobody knows which"
	}
	return oneLine(fmt.Sprintf("%v; %s, and %d went on from epoch %s; broken: %s; all paths end, and somebody has to vouch for the node; the damaged file is kept as %s",
		found, lost, r.Entries, before, strings.Join(r.Broken, ", "), r.File))
}
