package agent

import (
	"io"
	"net/http"
	"testing"

	"github.com/sallyport-dev/sallyport/pkg/datapath"
	"github.com/sallyport-dev/sallyport/pkg/policy"
	"github.com/sallyport-dev/sallyport/pkg/px"
	"github.com/sallyport-dev/sallyport/pkg/store"
)

// offline reads the rows and the open paths of a node on which no agent lives.
func (in *installed) offline() (rows map[string]string, open map[string]int) {
	in.t.Helper()
	s, err := store.Open(storeFile(in.cfg))
	must(in.t, err)
	defer s.Close()
	var px0 int
	must(in.t, in.lab.Node.Do(func() error {
		ns, err := px.Open(in.cfg.PxPath())
		if err != nil {
			return err
		}
		px0 = ns.Px0()
		return ns.Close()
	}))
	d, err := datapath.Open(datapath.Config{Dir: in.cfg.PinDir(), PxNetns: in.cfg.PxPath(), Px0: px0,
		ListenPort: in.cfg.Spec.Proxy.ListenPort, MaxTTL: policy.MaxGrantDuration})
	must(in.t, err)
	defer d.Close()
	rows, open = make(map[string]string), make(map[string]int)
	all, err := s.Grants(in.t.Context())
	must(in.t, err)
	for _, row := range all {
		rows[row.ID] = row.State
	}
	paths, err := d.Paths()
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
