package collector

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/pkg/api"
	"github.com/sallyport-dev/sallyport/pkg/proof"
)

// logKeyOf is the public half that lies beside the records.
func (r *running) logKeyOf(t *testing.T) note.Verifier {
	t.Helper()
	text := must(os.ReadFile(filepath.Join(r.cfg.Dir, publicKeyFile)))(t)
	return must(note.NewVerifier(strings.TrimSpace(string(text))))(t)
}

// grownTo holds what a collector says of its log against an older checkpoint.
func grownTo(t *testing.T, key note.Verifier, older proof.Checkpoint, g *api.Grown) proof.Checkpoint {
	t.Helper()
	c, err := tryGrown(key, older, g)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func tryGrown(key note.Verifier, older proof.Checkpoint, g *api.Grown) (proof.Checkpoint, error) {
	c, err := proof.OpenCheckpoint(g.GetCheckpoint(), key)
	if err != nil {
		return c, err
	}
	var p tlog.TreeProof
	for _, h := range g.GetProof() {
		p = append(p, tlog.Hash(h))
	}
	if older.Origin == "" {
		older.Origin = c.Origin
	}
	return c, c.Grew(older, p)
}

func (r *running) treeHead(t *testing.T, from int64) *api.LogReply {
	t.Helper()
	return must(r.reader(t).Log(t.Context(), &api.LogRequest{From: uint64(from)}))(t)
}

func (r *running) evidence(t *testing.T, q *api.EvidenceRequest) []byte {
	t.Helper()
	return must(r.tryEvidence(t, q))(t)
}

func (r *running) tryEvidence(t *testing.T, q *api.EvidenceRequest) ([]byte, error) {
	t.Helper()
	stream, err := r.reader(t).Evidence(t.Context(), q)
	parts, err := drain(stream, err)
	var out []byte
	for _, p := range parts {
		out = append(out, p.GetData()...)
	}
	return out, err
}

// proven reads a bundle as somebody does who trusts the log's key alone, and returns the entries that it proves.
func proven(bundle []byte, key note.Verifier) (entries []proof.Entry, err error) {
	var head proof.Checkpoint
	nodes := map[string]note.Verifier{}
	last := map[proof.Sequence]proof.Seal{}
	lines, ended := int64(0), false
	for d := json.NewDecoder(bytes.NewReader(bundle)); ; lines++ {
		var l proof.Line
		if err := d.Decode(&l); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		if l.Kind == proof.LineCheckpoint {
			if head, err = proof.OpenCheckpoint([]byte(l.Note), key); err != nil {
				return nil, err
			}
			continue
		}
		if ended = l.Kind == proof.LineEnd; ended {
			if l.Count != lines {
				return nil, fmt.Errorf("%d lines, not %d", lines, l.Count)
			}
			continue
		}
		if err := tlog.CheckRecord(l.Proof, head.Size, head.Root, l.Index, tlog.RecordHash(l.Leaf)); err != nil {
			return nil, fmt.Errorf("%s, leaf %d: %w", l.Kind, l.Index, err)
		}
		switch l.Kind {
		case proof.LineKey:
			node, epoch, vkey, err := proof.ParseKeyLeaf(l.Leaf)
			if err != nil {
				return nil, err
			}
			if nodes[node+epoch], err = note.NewVerifier(vkey); err != nil {
				return nil, err
			}
		case proof.LineEvent:
			_, e, err := proof.ParseEventLeaf(l.Leaf)
			if err != nil {
				return nil, err
			}
			entries = append(entries, e)
		case proof.LineBatch, proof.LineRecord:
			s, err := openAny(l.Leaf, nodes)
			if err != nil {
				return nil, err
			}
			if l.Kind == proof.LineRecord {
				err = tlog.CheckRecord(l.Path, int64(s.Entries), s.Root, l.At, l.Entries[0].Hash())
			} else if err = s.Check(l.Entries); err == nil {
				if before, ok := last[s.Sequence]; ok && before.Last+1 != s.First {
					err = fmt.Errorf("%d to %d are missing", before.Last+1, s.First-1)
				}
				last[s.Sequence] = s
			}
			if err != nil {
				return nil, err
			}
			entries = append(entries, l.Entries...)
		}
	}
	if !ended {
		return nil, errors.New("bundle was cut off")
	}
	return entries, nil
}

func openAny(leaf []byte, nodes map[string]note.Verifier) (proof.Seal, error) {
	l := strings.Split(string(leaf), "\n")
	if len(l) < 3 || nodes[l[1]+l[2]] == nil {
		return proof.Seal{}, errors.New("seal of a node whose key was not told")
	}
	return proof.OpenSeal(leaf, nodes[l[1]+l[2]])
}

func numbers(entries []proof.Entry) (out []uint64) {
	for _, e := range entries {
		out = append(out, e.Seq)
	}
	return out
}

// What a node seals is in the log, and is proven by it: all of a time, a grant's events, and one record.
func TestEvidence(t *testing.T) { onEngines(t, testEvidence) }

func testEvidence(t *testing.T, i ids) {
	r := start(t, i, nil)
	n, w := r.connect(t, "node-1", epoch1)
	if w.GetVersion() != 2 || w.GetLogKey() == "" || len(w.GetFlowSeal()) != 0 {
		t.Fatalf("welcome: %v", w)
	}
	key := r.logKeyOf(t)
	empty := grownTo(t, key, proof.Checkpoint{}, w.GetGrown())
	n.store(flows, flowEntries(1, 3)...)
	n.store(critical, grantEntry(1, "g", "ACTIVATED"), grantEntry(2, "other", "ACTIVATED"))
	n.store(flows, lossEntry(8, 5), flowEntry(9, nil))
	n.store(critical, grantEntry(3, "g", "ENDED"))
	other, _ := r.connect(t, "node-2", epoch1)
	other.store(flows, flowEntries(1, 2)...)

	c := grownTo(t, key, empty, r.treeHead(t, 0).GetGrown())
	if c.Size != 2+3+5 { // keys, grant events, seals
		t.Errorf("log has %d leaves", c.Size)
	}
	for _, q := range []struct {
		name string
		ask  *api.EvidenceRequest
		want []uint64
	}{
		{"all", &api.EvidenceRequest{}, []uint64{1, 2, 3, 1, 2, 8, 9, 3, 1, 2}},
		{"node", &api.EvidenceRequest{Node: "node-2"}, []uint64{1, 2}},
		{"receipt", &api.EvidenceRequest{Grant: "g"}, []uint64{1, 3}},
		{"record", &api.EvidenceRequest{Node: "node-1", Epoch: epoch1, Class: flows, Seq: 9}, []uint64{9}},
		{"lost number", &api.EvidenceRequest{Node: "node-1", Epoch: epoch1, Class: flows, Seq: 5}, []uint64{8}},
		{"first", &api.EvidenceRequest{Node: "node-1", Epoch: epoch1, Class: critical, Seq: 1}, []uint64{1}},
	} {
		t.Run(q.name, func(t *testing.T) {
			got, err := proven(r.evidence(t, q.ask), key)
			if err != nil || !reflect.DeepEqual(numbers(got), q.want) {
				t.Errorf("proven are %v, %v; want %v", numbers(got), err, q.want)
			}
		})
	}
	for _, q := range []struct {
		name string
		ask  *api.EvidenceRequest
		want codes.Code
	}{
		{"number to come", &api.EvidenceRequest{Node: "node-1", Epoch: epoch1, Class: flows, Seq: 10}, codes.NotFound},
		{"no node", &api.EvidenceRequest{Seq: 1, Epoch: epoch1, Class: flows}, codes.InvalidArgument},
		{"class alone", &api.EvidenceRequest{Class: flows}, codes.InvalidArgument},
		{"no such grant", &api.EvidenceRequest{Grant: "x"}, codes.NotFound},
	} {
		if _, err := r.tryEvidence(t, q.ask); status.Code(err) != q.want {
			t.Errorf("%s: %v", q.name, err)
		}
	}
	if _, err := r.reader(t).Log(t.Context(), &api.LogRequest{From: 11}); status.Code(err) != codes.OutOfRange {
		t.Errorf("growth since more than there is: %v", err)
	}
}

// A checkpoint of any size is proven to be a beginning of the latest one.
func TestLogGrows(t *testing.T) { onEngines(t, testLogGrows) }

func testLogGrows(t *testing.T, i ids) {
	r := start(t, i, nil)
	key := r.logKeyOf(t)
	n, _ := r.connect(t, "node-1", epoch1)
	var was []proof.Checkpoint
	for seq := uint64(1); seq <= 9; seq++ {
		n.store(flows, flowEntry(seq, nil))
		was = append(was, grownTo(t, key, proof.Checkpoint{}, r.treeHead(t, 0).GetGrown()))
	}
	for _, c := range was {
		grownTo(t, key, c, r.treeHead(t, c.Size).GetGrown())
	}
	forged := was[3]
	forged.Root[0] ^= 1
	if _, err := tryGrown(key, forged, r.treeHead(t, forged.Size).GetGrown()); err == nil {
		t.Error("another history was taken for the same")
	}
}

// everyLeaf reads the whole log, and holds its checkpoint against hashes that are made anew.
func (r *running) everyLeaf(t *testing.T, key note.Verifier) (leaves [][]byte) {
	t.Helper()
	r.eachDay(t, func(db tables) error {
		rows, err := db.Query(`SELECT idx, data FROM leaves` + db.suffix + ` ORDER BY idx`)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var at int
			var data []byte
			if err := rows.Scan(&at, &data); err != nil || at != len(leaves) {
				t.Fatalf("leaf %d is at %d, %v", len(leaves), at, err)
			}
			leaves = append(leaves, data)
		}
		return rows.Err()
	})
	c := must(proof.OpenCheckpoint(r.head(t).checkpoint, key))(t)
	if c.Size != int64(len(leaves)) || c.Root != rootOf(t, leaves) {
		t.Errorf("checkpoint is of %d leaves, there are %d, or its root is another", c.Size, len(leaves))
	}
	return leaves
}

func rootOf(t *testing.T, leaves [][]byte) tlog.Hash {
	t.Helper()
	var stored []tlog.Hash
	read := tlog.HashReaderFunc(func(indexes []int64) (out []tlog.Hash, err error) {
		for _, x := range indexes {
			out = append(out, stored[x])
		}
		return out, nil
	})
	for i, l := range leaves {
		stored = append(stored, must(tlog.StoredHashes(int64(i), l, read))(t)...)
	}
	return must(tlog.TreeHash(int64(len(leaves)), read))(t)
}

// The log goes on over days and restarts, and what is of a day that was removed can be proven to have been there.
func TestLogOverDays(t *testing.T) { onEngines(t, testLogOverDays) }

func testLogOverDays(t *testing.T, i ids) {
	at := &clock{t: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}
	dir := filepath.Join(t.TempDir(), "days")
	run := func() *running {
		return start(t, i, func(c *Config) { c.Dir, c.Now, c.Boot, c.Retain = dir, at.now, at.boot, 3*24*time.Hour })
	}
	r := run()
	key := r.logKeyOf(t)
	var was []proof.Checkpoint
	for day := range uint64(4) {
		for range 2 { // on a stream each
			n, w := r.connect(t, "node-1", epoch1)
			n.store(flows, flowEntries(w.GetFlowSeq()+1, w.GetFlowSeq()+5)...)
			n.store(critical, grantEntry(w.GetCriticalSeq()+1, "g", "ACTIVATED"))
			was = append(was, grownTo(t, key, proof.Checkpoint{}, r.treeHead(t, 0).GetGrown()))
		}
		if day == 1 {
			r.stop()
			r = run()
		}
		at.pass(24 * time.Hour)
	}
	check := func(wantAll int, receipts int) {
		t.Helper()
		for _, c := range was {
			grownTo(t, key, c, r.treeHead(t, c.Size).GetGrown())
		}
		all, err := proven(r.evidence(t, &api.EvidenceRequest{}), key)
		if err != nil || len(all) != wantAll {
			t.Errorf("%d entries are proven, want %d: %v", len(all), wantAll, err)
		}
		events, err := proven(r.evidence(t, &api.EvidenceRequest{Grant: "g"}), key)
		if err != nil || len(events) != receipts {
			t.Errorf("%d events are proven, want %d: %v", len(events), receipts, err)
		}
	}
	check(48, 8)
	if leaves := r.everyLeaf(t, key); len(leaves) != 1+8+16 {
		t.Errorf("log has %d leaves", len(leaves))
	}
	for range 2 { // the first two days are over their time, and go one by one
		at.pass(24 * time.Hour)
		n, w := r.connect(t, "node-1", epoch1)
		n.store(flows, flowEntry(w.GetFlowSeq()+1, nil))
	}
	for range 2 {
		if first := r.dayNames(t)[0]; first != "2026-03-03" {
			t.Fatalf("the first day is %s", first)
		}
		check(24+2, 4)
		r.stop()
		r = run()
	}
}
