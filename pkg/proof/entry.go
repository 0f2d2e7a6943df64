package proof

import (
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
)

// Fields of api.Entry and api.LossRecord, which this package does not import: who verifies needs no means to speak to a collector.
// TestFieldsAreThoseOfTheWire holds them.
const (
	fieldFlow  protowire.Number = 2
	fieldGrant protowire.Number = 3
	fieldLoss  protowire.Number = 4
	fieldTide  protowire.Number = 5

	fieldStage protowire.Number = 1
	fieldCause protowire.Number = 2
	fieldCount protowire.Number = 3
)

// readEntry tells what kind of record an entry is, as far as the proof depends on it: a loss counts numbers, and a grant event stands
// in the log too. What is unknown is a record like others.
func readEntry(data []byte) (loss *Loss, isGrant bool, err error) {
	known := 0
	err = fields(data, func(n protowire.Number, kind protowire.Type, value []byte, _ uint64) error {
		if n < fieldFlow || n > fieldTide || kind != protowire.BytesType {
			return nil
		}
		known++
		switch n {
		case fieldGrant:
			isGrant = true
		case fieldLoss:
			loss = &Loss{}
			return readLoss(value, loss)
		}
		return nil
	})
	if err == nil && known > 1 {
		err = fmt.Errorf("%w: it is two records in one", ErrFormat)
	}
	return loss, isGrant, err
}

// CheckEntry tells whether a proof takes an entry for what its reader took it for: the loss that it is, or nil, and whether it is a grant
// event. A record that two readers read in two ways would make evidence of the whole log worthless, so a collector has to refuse it.
func CheckEntry(data []byte, loss *Loss, isGrant bool) error {
	have, haveGrant, err := readEntry(data)
	switch {
	case err != nil:
		return err
	case haveGrant != isGrant || (have == nil) != (loss == nil) || have != nil && *have != *loss:
		return fmt.Errorf("%w: it can be read in two ways", ErrFormat)
	}
	return nil
}

func readLoss(data []byte, loss *Loss) error {
	return fields(data, func(n protowire.Number, kind protowire.Type, value []byte, count uint64) error {
		switch {
		case n == fieldStage && kind == protowire.BytesType:
			loss.Stage = string(value)
		case n == fieldCause && kind == protowire.BytesType:
			loss.Cause = string(value)
		case n == fieldCount && kind == protowire.VarintType:
			loss.Count = count
		}
		return nil
	})
}

// fields visits those of a message, each with what it holds if it is a varint or has a length. A field of another type than its own is
// unknown, as it is to protobuf: whoever visits looks at the type.
func fields(data []byte, visit func(n protowire.Number, kind protowire.Type, value []byte, varint uint64) error) error {
	for len(data) > 0 {
		number, kind, n := protowire.ConsumeTag(data)
		if n < 0 {
			return fmt.Errorf("%w: it is no record", ErrFormat)
		}
		data = data[n:]
		var value []byte
		var varint uint64
		switch kind {
		case protowire.VarintType:
			varint, n = protowire.ConsumeVarint(data)
		case protowire.BytesType:
			value, n = protowire.ConsumeBytes(data)
		default:
			n = protowire.ConsumeFieldValue(number, kind, data)
		}
		if n < 0 {
			return fmt.Errorf("%w: it is no record", ErrFormat)
		}
		data = data[n:]
		if err := visit(number, kind, value, varint); err != nil {
			return err
		}
	}
	return nil
}
