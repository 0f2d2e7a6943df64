package proof

import (
	"errors"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/pkg/api"
)

// TestEntryIsWhatProtobufMakesOfIt: a field of another type than its own is unknown to both readers, and what holds two records is none.
func TestEntryIsWhatProtobufMakesOfIt(t *testing.T) {
	marshal := func(e *api.Entry) []byte {
		data, err := proto.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	flow := marshal(&api.Entry{Record: &api.Entry_Flow{Flow: &api.FlowRecord{Event: "OPEN"}}})
	grant := marshal(&api.Entry{Record: &api.Entry_Grant{Grant: &api.GrantEvent{Grant: "g"}}})
	lost := marshal(&api.Entry{Record: &api.Entry_Loss{Loss: &api.LossRecord{Stage: "s", Cause: "c", Count: 3}}})
	join := func(parts ...[]byte) (out []byte) {
		for _, p := range parts {
			out = append(out, p...)
		}
		return out
	}
	varint := func(n protowire.Number) []byte {
		return protowire.AppendVarint(protowire.AppendTag(nil, n, protowire.VarintType), 1)
	}
	fixed := func(n protowire.Number) []byte {
		return protowire.AppendFixed64(protowire.AppendTag(nil, n, protowire.Fixed64Type), 7)
	}
	lossOf := func(inner []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(nil, fieldLoss, protowire.BytesType), inner)
	}
	inner, err := proto.Marshal(&api.LossRecord{Stage: "s", Cause: "c", Count: 3})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		data []byte
		bad  bool
	}{
		{"flow", flow, false},
		{"grant", grant, false},
		{"loss", lost, false},
		{"flow, and a grant that is a number", join(flow, varint(fieldGrant)), false},
		{"grant, and a loss that is a number", join(grant, varint(fieldLoss)), false},
		{"a count of another type", lossOf(join(inner, fixed(fieldCount))), false},
		{"a stage that is a number", lossOf(join(inner, varint(fieldStage))), false},
		{"two counts", lossOf(join(inner, varint(fieldCount))), false},
		{"grant and flow", join(grant, flow), true},
		{"flow and grant", join(flow, grant), true},
		{"one loss in two parts", join(lost, lost), true},
	} {
		e := &api.Entry{}
		if err := proto.Unmarshal(c.data, e); err != nil {
			t.Fatal(err)
		}
		var loss *Loss
		if l := e.GetLoss(); l != nil {
			loss = &Loss{l.GetStage(), l.GetCause(), l.GetCount()}
		}
		if err := CheckEntry(c.data, loss, e.GetGrant() != nil); (err != nil) != c.bad || err != nil && !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	for name, err := range map[string]error{
		"no grant":      CheckEntry(grant, nil, false),
		"no loss":       CheckEntry(lost, nil, false),
		"another count": CheckEntry(lost, &Loss{"s", "c", 4}, false),
	} {
		if !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
