package datapath

import "github.com/sallyport-dev/sallyport/bpf"

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
