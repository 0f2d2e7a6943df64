package datapath

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// tcxLink holds a place by a link, on Linux 6.6 and later.
type tcxLink struct {
	link.Link
	place place
}

// takeLink adopts the link pinned at the path, or makes one at the head of the chain. It is pinned
// before anything relies on it. fresh is called before one is made: its device is a new one.
func takeLink(p place, prog *ebpf.Program, pin string, fresh func() error) (hold, error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if err == nil {
		if h := (tcxLink{l, p}); h.there() {
			return h, h.update(prog)
		}
		err := tcxLink{l, p}.drop() // its device is gone, or moved away with it
		closeLink(l)
		if err = errors.Join(err, os.Remove(pin)); err != nil {
			return nil, fmt.Errorf("remove stale pin: %w", err)
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("open pinned link: %w", err)
	}
	if err := fresh(); err != nil {
		return nil, err
	}
	return newLink(p, prog, pin)
}

func newLink(p place, prog *ebpf.Program, pin string) (hold, error) {
	l, err := link.AttachTCX(link.TCXOptions{Interface: p.ifindex, Program: prog, Attach: p.attach, Anchor: link.Head()})
	if err != nil {
		return nil, err
	}
	if err := l.Pin(pin); err != nil {
		closeLink(l)
		return nil, fmt.Errorf("pin link: %w", err)
	}
	return tcxLink{l, p}, nil
}

// there reads the device of the link: 0 once it was detached or its device went away.
func (h tcxLink) there() bool {
	info, err := h.Info()
	if err != nil {
		return false
	}
	tcx := info.TCX()
	return tcx != nil && int(tcx.Ifindex) == h.place.ifindex
}

func (h tcxLink) first() (bool, error) {
	chain, err := tcxChain(h.place)
	if err != nil {
		return false, err
	}
	return len(chain) > 0 && h.is(chain[0]), nil
}

func (h tcxLink) lead(prog *ebpf.Program, pin string) (hold, error) {
	next := pin + "-next"
	if err := os.Remove(next); err != nil && !errors.Is(err, os.ErrNotExist) { // of one that was killed here
		return h, fmt.Errorf("remove stale pin: %w", err)
	}
	ahead, err := newLink(h.place, prog, next)
	if err != nil {
		return h, err
	}
	err = errors.Join(h.drop(), os.Remove(pin), h.close())
	return ahead, errors.Join(err, ahead.(tcxLink).Pin(pin))
}

func (h tcxLink) update(prog *ebpf.Program) error { return updateLink(h.Link, prog) }

// updateLink gives a link this version's program, unless it has the same code already.
func updateLink(l link.Link, prog *ebpf.Program) error {
	info, err := l.Info()
	if err != nil {
		return fmt.Errorf("read link: %w", err)
	}
	same, err := sameProgram(info.Program, prog)
	if same || err != nil {
		return err
	}
	if err := l.Update(prog); err != nil {
		return fmt.Errorf("update link: %w", err)
	}
	return nil
}

func (h tcxLink) is(f found) bool {
	info, err := h.Info()
	return err == nil && f.link != 0 && info.ID == f.link
}

// drop takes it off its device wherever that is: one that moves to another namespace takes its links along, and may get
// another number there.
func (h tcxLink) drop() error {
	if !attachedSomewhere(h.Link) {
		return nil
	}
	if err := h.Detach(); err != nil {
		return fmt.Errorf("detach link: %w", err)
	}
	return nil
}

func (h tcxLink) close() error { return h.Close() }

// tcxChain lists the tcx programs of a place, ours and others'; none where the device is gone or the
// kernel has no tcx.
func tcxChain(p place) ([]found, error) {
	result, err := link.QueryPrograms(link.QueryOptions{Target: p.ifindex, Attach: p.attach})
	if errors.Is(err, unix.ENODEV) || err != nil && haveTCX() != nil {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var chain []found
	for _, prog := range result.Programs {
		name, err := programName(prog.ID)
		if err != nil {
			return nil, err
		}
		id, _ := prog.LinkID()
		chain = append(chain, found{name: name, program: prog.ID, link: id, place: p})
	}
	return chain, nil
}

// dropLink is content with a link that is gone.
func dropLink(id link.ID) error {
	l, err := link.NewFromID(id)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer closeLink(l)
	return l.Detach()
}
