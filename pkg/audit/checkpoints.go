package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/proof"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// Notes in the store that the collector's log needs.
const (
	noteLogKey     = "log-key"
	noteCheckpoint = "checkpoint"
	noteConflict   = "checkpoint-conflict" // two checkpoints that cannot both be true, for people
)

// keepEvery is how often a log that grows is written to the disk. What a kill takes of that, the collector proves again.
const keepEvery = 5 * time.Second

// maxShown is how long a key and a checkpoint may be that a collector shows.
const maxShown = 4096

// witness is what the node holds the collector's log to: the key that it had first, or that is configured, and the latest
// checkpoint that grew out of those before. A node that keeps them sees it when the log is set back, and when others are shown
// another one.
type witness struct {
	vkey    string
	key     note.Verifier // nil: no log was seen yet
	latest  proof.Checkpoint
	signed  []byte // latest, as it was signed; nil: none was seen yet
	problem string // what the collector showed does not fit to it
}

func newWitness(vkey string) (witness, error) {
	if len(vkey) > maxShown {
		return witness{}, errors.New("key is too long")
	}
	key, err := note.NewVerifier(vkey)
	if err != nil {
		return witness{}, err
	}
	return witness{vkey: vkey, key: key, latest: proof.Checkpoint{Origin: key.Name()}}, nil
}

// notes is what of it outlives the process.
func (w witness) notes() []store.Note {
	return []store.Note{{Name: noteLogKey, Data: []byte(w.vkey)}, {Name: noteCheckpoint, Data: w.signed}}
}

// grown is the witness of a later checkpoint, whose proof has to hold.
func (w witness) grown(g *api.Grown) (witness, error) {
	if g == nil && w.latest.Size == 0 {
		return w, nil
	}
	if len(g.GetCheckpoint()) > maxShown {
		return w, errors.New("checkpoint is too long")
	}
	c, err := proof.OpenCheckpoint(g.GetCheckpoint(), w.key)
	if err != nil {
		return w, err
	}
	var steps tlog.TreeProof
	for _, h := range g.GetProof() {
		if len(h) != tlog.HashSize {
			return w, fmt.Errorf("proof has a hash of %d bytes", len(h))
		}
		steps = append(steps, tlog.Hash(h))
	}
	if err := c.Grew(w.latest, steps); err != nil {
		return w, err
	}
	w.latest, w.signed, w.problem = c, g.GetCheckpoint(), ""
	return w, nil
}

// takeWitness takes up what the process before knew of the log. Another key in the configuration begins anew: whoever wrote it knows
// that there is another log.
func (s *Streamer) takeWitness(ctx context.Context) error {
	pinned, err := readNote(ctx, s.cfg.Store, noteLogKey)
	if err != nil {
		return err
	}
	vkey := s.cfg.LogKey
	if vkey == "" {
		vkey = string(pinned)
	}
	if vkey == "" {
		return nil
	}
	if s.witness, err = newWitness(vkey); err != nil {
		return fmt.Errorf("read key of the collector's log: %w", err)
	}
	if vkey != string(pinned) {
		return nil
	}
	s.kept = s.witness
	signed, err := readNote(ctx, s.cfg.Store, noteCheckpoint)
	if err != nil || signed == nil {
		return err
	}
	s.witness.signed = signed
	if s.witness.latest, err = proof.OpenCheckpoint(signed, s.witness.key); err != nil {
		return fmt.Errorf("read note %s: %w", noteCheckpoint, err)
	}
	s.kept = s.witness
	return nil
}

// meetLog holds the log of the collector that answered to the one that the node knows. Another one, or one that did not grow out of
// it, is an alarm and no reason to keep records back. Only what people configured is more than the node's own memory: a log with
// another key than that gets nothing.
func (ss *session) meetLog(ctx context.Context, w *api.Welcome) error {
	if ss.witness.key == nil {
		first, err := newWitness(w.GetLogKey())
		if err != nil {
			ss.dispute(ctx, w.GetLogKey(), nil, "it shows no key of its log")
			return nil
		}
		ss.setWitness(first)
	}
	if w.GetLogKey() == ss.witness.vkey {
		ss.grow(ctx, w.GetGrown())
		return ss.keepWitness(ctx)
	}
	if ss.cfg.LogKey == "" {
		ss.dispute(ctx, w.GetLogKey(), w.GetGrown(), "its log has another key; if that is meant to be, configure it as collector.logKey")
		return nil
	}
	why := "its log has another key than collector.logKey, which is configured here"
	ss.dispute(ctx, w.GetLogKey(), w.GetGrown(), why)
	return fmt.Errorf("greet collector: %s", why)
}

// grow takes a later checkpoint. A proof is from the one that the collector sent before it on the same stream: after one that was not
// taken there is none that could be.
func (ss *session) grow(ctx context.Context, g *api.Grown) {
	if ss.disputed {
		return
	}
	later, err := ss.witness.grown(g)
	if err != nil {
		ss.dispute(ctx, ss.witness.vkey, g, err.Error())
		return
	}
	ss.setWitness(later)
}

// keepWitness writes the witness, if the disk has another. It goes on also where the disk does not take it: it may take the next one.
func (s *Streamer) keepWitness(ctx context.Context) error {
	if s.witness.vkey == s.kept.vkey && bytes.Equal(s.witness.signed, s.kept.signed) {
		return nil
	}
	err := s.cfg.Store.KeepUrgent(ctx, s.witness.notes())
	s.noteStore(ctx, err)
	switch {
	case err == nil:
		s.kept = s.witness
	case !store.Unwritable(err):
		return err
	}
	return nil
}

// keepLast is keepWitness when a connection is over, also by an orderly stop. A key that is configured and that no log was seen with
// does not take the place of what the store has.
func (s *Streamer) keepLast(ctx context.Context) error {
	if s.witness.signed == nil {
		return nil
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	return s.keepWitness(last)
}

func (s *Streamer) setWitness(w witness) {
	s.mu.Lock()
	s.witness = w
	s.mu.Unlock()
}

// dispute tells of what was shown. The checkpoint that the node has stays the one that later ones are held to. A collector that goes
// on like that is told of once.
func (ss *session) dispute(ctx context.Context, vkey string, g *api.Grown, why string) {
	ss.disputed = true
	was := ss.witness
	now := was
	now.problem = why
	ss.setWitness(now)
	if was.problem != "" {
		return
	}
	shown := g.GetCheckpoint()
	both := fmt.Sprintf("kept, by the key %s\n%s\nshown, by the key %s\n%s", was.vkey, was.signed, vkey[:min(len(vkey), maxShown)], shown[:min(len(shown), maxShown)])
	ss.log.ErrorContext(ctx, "collector's log is not the one that it was", "why", why, "checkpoints", both)
	ss.noteStore(ctx, ss.cfg.Store.KeepUrgent(ctx, []store.Note{{Name: noteConflict, Data: []byte(both)}}))
	ss.cfg.Alarm("the collector " + ss.cfg.Address + ": " + why)
}
