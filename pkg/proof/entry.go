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
	err = fields(data, func(n protowire.Number, value []byte, _ uint64) error {
		if n >= fieldFlow && n <= fieldTide {
			known++
		}
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

func readLoss(data []byte, loss *Loss) error {
	return fields(data, func(n protowire.Number, value []byte, count uint64) error {
		switch n {
		case fieldStage:
			loss.Stage = string(value)
		case fieldCause:
			loss.Cause = string(value)
		case fieldCount:
			loss.Count = count
		}
		return nil
	})
}

// fields visits those of a message that are varints or have a length.
func fields(data []byte, visit func(n protowire.Number, value []byte, varint uint64) error) error {
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
		if err := visit(number, value, varint); err != nil {
			return err
		}
	}
	return nil
}
