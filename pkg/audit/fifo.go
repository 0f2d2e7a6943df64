package audit

// fifo is a queue in one block of memory, which grows as needed and is given back when the queue is
// empty.
type fifo struct {
	ring []item // its length is a power of two, or zero
	head int
	n    int
}

const minRing = 64

func (f *fifo) len() int { return f.n }

// at returns the i-th oldest item, for as long as the queue is not changed.
func (f *fifo) at(i int) *item { return &f.ring[(f.head+i)&(len(f.ring)-1)] }

func (f *fifo) push(i item) {
	if f.n == len(f.ring) {
		grown := make([]item, max(2*len(f.ring), minRing))
		for k := range f.n {
			grown[k] = *f.at(k)
		}
		f.ring, f.head = grown, 0
	}
	f.n++
	*f.at(f.n - 1) = i
}

// drop forgets the k oldest items, and lets the garbage collector have what they hold.
func (f *fifo) drop(k int) {
	for range k {
		*f.at(0) = item{}
		f.head = (f.head + 1) & (len(f.ring) - 1)
		f.n--
	}
	if f.n == 0 && len(f.ring) > minRing {
		*f = fifo{}
	}
}
