package main

import (
	"iter"

	"google.golang.org/protobuf/proto"
)

// showStream writes results as they come: lines of a table, or one object per line.
func showStream[M proto.Message](c *cli, columns []column, results iter.Seq2[M, error], cells func(M) []string) error {
	if c.output == formatTable {
		if err := writeColumns(c.stdout, columns, titles(columns)); err != nil {
			return err
		}
	}
	for result, err := range results {
		if err != nil {
			return err
		}
		if c.output == formatTable {
			err = writeColumns(c.stdout, columns, cells(result))
		} else {
			err = c.showObject(result)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
