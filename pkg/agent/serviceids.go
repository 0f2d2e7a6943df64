package agent

import "github.com/sallyport-dev/sallyport/pkg/datapath"

// serviceIDs gives each service its number in the kernel's maps. Paths that outlive the agent carry these numbers, so a
// name keeps the number that the table in force gives it, and no number is given out twice by one agent.
type serviceIDs struct {
	next uint32
	ids  map[string]uint32
}

// newServiceIDs goes on from the table in force.
func newServiceIDs(table []datapath.Service) *serviceIDs {
	s := &serviceIDs{next: 1, ids: make(map[string]uint32)}
	for _, row := range table {
		s.ids[row.Name] = row.ID
		s.next = max(s.next, row.ID+1)
	}
	return s
}

// assign fills in the numbers.
func (s *serviceIDs) assign(services []datapath.Service) {
	for i := range services {
		id, ok := s.ids[services[i].Name]
		if !ok {
			id = s.next
			s.ids[services[i].Name] = id
			s.next++
		}
		services[i].ID = id
	}
}
