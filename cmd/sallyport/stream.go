package main

import (
	"iter"

	"google.golang.org/protobuf/proto"
)

// showStream writes results as they come: lines of a table, or one object per line. It gives how
// many there were.
func showStream[M proto.Message](c *cli, columns []column, results iter.Seq2[M, error], cells func(M) []string) (shown int, err error) {
	if c.output == formatTable {
		if err := writeColumns(c.stdout, columns, titles(columns)); err != nil {
			return 0, err
		}
	}
	for result, err := range results {
		if err != nil {
			return shown, err
		}
		if c.output == formatTable {
			err = writeColumns(c.stdout, columns, cells(result))
		} else {
			err = c.showObject(result)
		}
		if err != nil {
			return shown, err
		}
		shown++
	}
	return shown, nil
}
