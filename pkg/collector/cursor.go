package collector

import (
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"strconv"
	"strings"
	"time"
)

// position is behind the last row that was looked at. Rows are in order of receipt: by day, and by id within one.
type position struct {
	day string
	id  int64
}

// cursors write positions for callers to come back with. One means nothing to another log, to the other engine, or for other records: it is refused there.
type cursors struct {
	engine byte
	log    uint32 // hash of its key
	table  string
}

// cursorSize is engine, log, table, day, id and checksum.
const cursorSize = 1 + 4 + 1 + 4 + 8 + 4

func (c cursors) of(p position) string {
	day, _ := strconv.ParseUint(strings.ReplaceAll(p.day, "-", ""), 10, 32) // it was made of a time
	b := binary.BigEndian.AppendUint32([]byte{c.engine}, c.log)
	b = append(b, byte(slices.Index(recordTables, c.table)))
	b = binary.BigEndian.AppendUint32(b, uint32(day))
	b = binary.BigEndian.AppendUint64(b, uint64(p.id))
	return base64.RawURLEncoding.EncodeToString(binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(b)))
}

func (c cursors) read(s string) (position, error) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil || len(b) != cursorSize || binary.BigEndian.Uint32(b[cursorSize-4:]) != crc32.ChecksumIEEE(b[:cursorSize-4]) {
		return position{}, errors.New("it is no cursor that a collector gave out: take one from -o json whole, or begin without one")
	}
	if b[0] != c.engine || binary.BigEndian.Uint32(b[1:]) != c.log {
		return position{}, errors.New("it is of another collector: begin without one")
	}
	if b[5] != byte(slices.Index(recordTables, c.table)) {
		return position{}, errors.New("it is of other records than are asked for: flows and grant events have cursors of their own")
	}
	day := fmt.Sprintf("%08d", binary.BigEndian.Uint32(b[6:]))
	t, err := time.Parse("20060102", day)
	if err != nil {
		return position{}, errors.New("it is no cursor that a collector gave out: take one from -o json whole, or begin without one")
	}
	return position{t.Format(dayLayout), int64(binary.BigEndian.Uint64(b[10:]))}, nil
}
