package agent

import (
	"io"
	"net/http"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// offline reads the rows and the open paths of a node on which no agent lives, as its operator would: no program is loaded.
func (in *installed) offline() (rows map[string]string, open map[string]int) {
	in.t.Helper()
	s, err := store.Open(storeFile(in.cfg))
	must(in.t, err)
	defer s.Close()
	rows, open = make(map[string]string), make(map[string]int)
	all, err := s.Grants(in.t.Context())
	must(in.t, err)
	for _, row := range all {
		rows[row.ID] = row.State
	}
	paths, err := datapath.ReadPaths(in.cfg.PinDir())
	must(in.t, err)
	for _, p := range paths {
		if isOpen(p) {
			open[p.Grant]++
		}
	}
	return rows, open
}

func readAll(t *testing.T, reply *http.Response) string {
	t.Helper()
	body, err := io.ReadAll(reply.Body)
	must(t, err)
	return string(body)
}
