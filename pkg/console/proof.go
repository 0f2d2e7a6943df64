package console

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"

	"golang.org/x/mod/sumdb/note"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

// Bounds of what a page verifies.
const (
	maxBundle = 32 << 20
	maxSealed = 40 // events whose batches are looked up
)

// recordKey names a grant event: those of nodes are of the critical class.
type recordKey struct {
	node, epoch string
	seq         uint64
}

// proofView is what came of verifying what the page shows.
type proofView struct {
	Verdict proof.Verdict
	Why     string
	Key     string // that it was verified with
	OwnWord bool   // the collector told it itself
	Log     proof.Checkpoint
	InLog   int // events that the log has, as they are shown
	Sealed  int // of those, in a batch that the node sealed
	Looked  int // for how many that was looked up
	Shown   int
	Batches []*sealView
}

// The verdict in the page's words.
func (p *proofView) Proven() bool    { return p.Verdict == proof.Proven }
func (p *proofView) Disproved() bool { return p.Verdict == proof.Disproved }

// sealView is one sealed batch of a node.
type sealView struct {
	proof.Seal
	Leaf int64
}

// addProof verifies what is shown: the grant's receipt, and for each event the batch that its node sealed it in.
func (c *console) addProof(ctx context.Context, p *grantPage) error {
	key, ownWord, err := c.logKey(ctx)
	if err != nil {
		return err
	}
	v := &proofView{Key: c.cfg.LogKey, OwnWord: ownWord, Shown: len(p.Steps)}
	p.Proof = v
	if v.Key == "" {
		v.Key = keyText(key)
	}
	lines, err := c.verified(ctx, &api.EvidenceRequest{Grant: p.ID}, key, v)
	if err != nil || !v.Proven() {
		return err
	}
	if err := matchEvents(p, lines); err != nil {
		v.Verdict, v.Why = proof.Disproved, err.Error()
		return nil
	}
	if v.InLog < v.Shown {
		v.Verdict, v.Why = proof.CannotTell, fmt.Sprintf("%d of the %d events below are not in the receipt: the collector shows them and does not prove them", v.Shown-v.InLog, v.Shown)
		return nil
	}
	return c.addSeals(ctx, p, key)
}

// logKey gives the key of the log, and whether it is the collector's own word.
func (c *console) logKey(ctx context.Context) (key note.Verifier, ownWord bool, err error) {
	if c.key != nil {
		return c.key, false, nil
	}
	reply, err := c.cfg.Audit.Log(ctx, &api.LogRequest{})
	if err != nil {
		return nil, true, err
	}
	key, err = note.NewVerifier(reply.GetKey())
	if err != nil {
		return nil, true, &problem{http.StatusBadGateway, "The collector's key cannot be read", err.Error(), "Compare it with log.pub in the collector's data directory."}
	}
	return key, true, nil
}

func keyText(key note.Verifier) string { return fmt.Sprintf("%s+%08x", key.Name(), key.KeyHash()) }

// verified fetches a bundle and verifies it. Its lines are given where they are proven.
func (c *console) verified(ctx context.Context, r *api.EvidenceRequest, key note.Verifier, v *proofView) ([]proof.Line, error) {
	data, err := c.evidence(ctx, r)
	if code := status.Code(err); code == codes.NotFound || code == codes.DataLoss || code == codes.Aborted {
		v.Verdict, v.Why = proof.CannotTell, status.Convert(err).Message()
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	report, err := proof.Verify(bytes.NewReader(data), key)
	if err != nil {
		return nil, err
	}
	v.Verdict, v.Why, v.Log = report.Verdict, report.Why, report.Checkpoint
	if report.Verdict != proof.Proven {
		return nil, nil
	}
	var lines []proof.Line
	for d := json.NewDecoder(bytes.NewReader(data)); ; {
		var l proof.Line
		if err := d.Decode(&l); errors.Is(err, io.EOF) {
			return lines, nil
		} else if err != nil {
			return nil, err
		}
		lines = append(lines, l)
	}
}

func (c *console) evidence(ctx context.Context, r *api.EvidenceRequest) ([]byte, error) {
	ctx, cancel := context.WithCancel(ctx) // what is too large is not read to its end
	defer cancel()
	stream, err := c.cfg.Audit.Evidence(ctx, r)
	var data []byte
	for err == nil {
		var chunk *api.EvidenceChunk
		if chunk, err = stream.Recv(); err == nil {
			data = append(data, chunk.GetData()...)
		}
		if len(data) > maxBundle {
			return nil, status.Error(codes.DataLoss, "the evidence is too large for a page: download it and verify it with `sallyport audit verify`")
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return data, err
}

// matchEvents marks the steps that the log has as they are shown. Its error says that one is shown in other words than the log has.
func matchEvents(p *grantPage, lines []proof.Line) error {
	inLog := map[recordKey]proof.Line{}
	for _, l := range lines {
		if l.Kind != proof.LineEvent {
			continue
		}
		id, e, err := proof.ParseEventLeaf(l.Leaf)
		if err != nil {
			return err
		}
		inLog[recordKey{id.Node, id.Epoch, e.Seq}] = l
	}
	for _, s := range p.Steps {
		l, ok := inLog[s.key]
		if !ok {
			continue
		}
		_, e, err := proof.ParseEventLeaf(l.Leaf)
		if err != nil {
			return err
		}
		var entry api.Entry
		if err := proto.Unmarshal(e.Data, &entry); err != nil || !proto.Equal(entry.GetGrant(), s.Event) {
			return fmt.Errorf("the %s of %s is shown otherwise than leaf %d of the log has it", s.Event.GetStep(), stamp(s.Time), l.Index)
		}
		s.InLog = l.Index
		p.Proof.InLog++
	}
	return nil
}

// addSeals looks up the batches in which the nodes sealed the events, and verifies each.
func (c *console) addSeals(ctx context.Context, p *grantPage, key note.Verifier) error {
	batches := map[int64]*sealView{}
	for _, s := range p.Steps[:min(len(p.Steps), maxSealed)] {
		one := proofView{}
		r := &api.EvidenceRequest{Node: s.key.node, Epoch: s.key.epoch, Class: api.Class_CLASS_CRITICAL, Seq: s.key.seq}
		lines, err := c.verified(ctx, r, key, &one)
		if err != nil {
			return err
		}
		p.Proof.Looked++
		if one.Disproved() {
			p.Proof.Verdict, p.Proof.Why = one.Verdict, fmt.Sprintf("the batch that has the %s of %s: %s", s.Event.GetStep(), stamp(s.Time), one.Why)
			return nil
		}
		if s.Seal, err = s.sealIn(lines, batches); err != nil {
			p.Proof.Verdict, p.Proof.Why = proof.Disproved, err.Error()
			return nil
		}
		if s.Seal != nil {
			p.Proof.Sealed++
		}
	}
	for _, s := range p.Steps {
		if b := s.Seal; b != nil && batches[b.Leaf] == b {
			p.Proof.Batches = append(p.Proof.Batches, b)
			delete(batches, b.Leaf)
		}
	}
	if v := p.Proof; v.Sealed < v.Looked { // a collector puts an event into its log with the batch that has it
		v.Verdict, v.Why = proof.CannotTell, fmt.Sprintf("%d of %d events are in no batch that a node sealed, as far as the collector shows: it alone could have made them up", v.Looked-v.Sealed, v.Looked)
	}
	return nil
}

// sealIn reads the seal of a verified record, which has to be over the event as it is shown; one batch is one view.
func (s *step) sealIn(lines []proof.Line, known map[int64]*sealView) (*sealView, error) {
	var key note.Verifier
	for _, l := range lines {
		switch l.Kind {
		case proof.LineKey:
			if _, _, vkey, err := proof.ParseKeyLeaf(l.Leaf); err == nil {
				key, _ = note.NewVerifier(vkey) // it was verified with it
			}
		case proof.LineRecord:
			seal, err := proof.OpenSeal(l.Leaf, key)
			if err != nil {
				return nil, err
			}
			if !s.sealedBy(seal, l.Entries) {
				return nil, fmt.Errorf("for the %s of %s the collector has a batch in which its node sealed another record", s.Event.GetStep(), stamp(s.Time))
			}
			if known[l.Index] == nil {
				known[l.Index] = &sealView{seal, l.Index}
			}
			return known[l.Index], nil
		}
	}
	return nil, nil
}

func (s *step) sealedBy(seal proof.Seal, entries []proof.Entry) bool {
	var entry api.Entry
	return seal.Sequence == proof.Sequence{Node: s.key.node, Epoch: s.key.epoch, Class: proof.ClassCritical} && len(entries) == 1 &&
		entries[0].Seq == s.key.seq && proto.Unmarshal(entries[0].Data, &entry) == nil && proto.Equal(entry.GetGrant(), s.Event)
}

var plainID = regexp.MustCompile(`^[0-9A-Za-z-]{1,64}$`)

// bundle sends a grant's receipt as a file, for `sallyport audit verify`.
func (c *console) bundle(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), pageTime)
	defer cancel()
	id, err := grantID(r)
	var data []byte
	if err == nil {
		data, err = c.evidence(ctx, &api.EvidenceRequest{Grant: id})
	}
	if err != nil {
		c.page(func(*http.Request) (answer, error) { return answer{}, err }).ServeHTTP(w, r)
		return
	}
	name := "grant.bundle" // nothing of a record becomes a file's name unless it is plain
	if plainID.MatchString(id) {
		name = "grant-" + id + ".bundle"
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Disposition", `attachment; filename="`+name+`"`)
	_, _ = w.Write(data) // a reader who left misses nothing
}
