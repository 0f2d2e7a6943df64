package datapath

import (
	"slices"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/pkg/flow"
)

// Seen is traffic of a service that is not enforced, as on the wire.
type Seen struct {
	Opens   uint64 // SYNs
	Packets uint64 // SYNs included; datagrams
	Bytes   uint64 // IP bytes
}

func (s *Seen) add(o bpf.Seen) {
	s.Opens += o.Opens
	s.Packets += o.Packets
	s.Bytes += o.Bytes
}

// Watched is what was seen of one service that is not enforced: all of it, and where it is shadowed what Enforce would
// have made of each packet, if its flow had begun with it.
type Watched struct {
	Seen                      Seen
	Proxied, Bypassed, Denied Seen
}

// Watched gives what was seen of every service that is not enforced, by its id, since it is none.
func (d *Datapath) Watched() (map[uint32]Watched, error) {
	out := map[uint32]Watched{}
	err := eachRow(d.objs.SpWatched, func(id uint32, perCPU []bpf.Watched) {
		var w Watched
		for _, c := range perCPU {
			w.Seen.add(c.Seen)
			w.Proxied.add(c.Proxied)
			w.Bypassed.add(c.Bypassed)
			w.Denied.add(c.Denied)
		}
		out[id] = w
	})
	return out, err
}

func (d *Datapath) addWatched(services []Service) error {
	return addRows[bpf.Watched](d.objs.SpWatched, services)
}

func (d *Datapath) dropWatched(services []Service) error {
	return dropRows[bpf.Watched](d.objs.SpWatched, services)
}

// endWatchedFlows ends the flows of services that are not enforced, for nothing looks at them there: a connection that somebody
// else makes meanwhile from the same port would have the flow once the service is enforced again. The connections go on.
func (d *Datapath) endWatchedFlows(services []Service) error {
	if len(services) == 0 {
		return nil
	}
	keys, flows, err := entries[bpf.FlowKey, bpf.Flow](d.objs.SpFlows)
	if err != nil {
		return err
	}
	var done over
	for i := range keys {
		if !slices.ContainsFunc(services, func(s Service) bool { return s.ID == flows[i].ServiceId }) {
			continue
		}
		path, _, err := d.pathOf(&flows[i])
		if err != nil {
			return err
		}
		done.add(keys[i], flows[i], flow.ReasonPolicyChanged, path)
	}
	ended, err := d.takeFlows(done)
	d.ended = append(d.ended, ended...)
	return err
}

// takeEnded gives what endWatchedFlows ended since it was asked last.
func (d *Datapath) takeEnded() []flow.Record {
	d.mu.Lock()
	defer d.mu.Unlock()
	ended := d.ended
	d.ended = nil
	return ended
}
