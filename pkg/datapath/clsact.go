package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// What our filters bear. Within a priority the filter that was added last runs first.
const (
	filterPriority = 1
	filterHandle   = 1
)

// filter holds a place by a filter of clsact, on Linux 5.15 and later. Nothing can run before a
// filter of priority 1 but a later one of the same priority.
type filter struct {
	place  place
	handle uint32
}

// takeFilter adopts our filter at the place, or adds one, with the qdisc if there is none. fresh is
// called before one is added: its device is a new one. It returns ErrOwned when somebody else has
// priority 1.
func takeFilter(p place, prog *ebpf.Program, qdiscs string, fresh func() error) (hold, error) {
	ours, err := findOurs(p)
	if err != nil {
		return nil, err
	}
	for _, f := range ours {
		if f.filter != 0 {
			h := &filter{place: p, handle: f.filter}
			return h, h.update(prog)
		}
	}
	if err := takeQdisc(p, qdiscs); err != nil {
		return nil, err
	}
	if err := checkPriority(p); err != nil {
		return nil, err
	}
	if err := fresh(); err != nil {
		return nil, err
	}
	h := &filter{place: p, handle: filterHandle}
	return h, h.put(prog)
}

// takeQdisc makes clsact if it is not there, and notes below qdiscs that it is ours.
func takeQdisc(p place, qdiscs string) error {
	all, err := netlink.QdiscList(p.link())
	if err != nil {
		return fmt.Errorf("list qdiscs: %w", err)
	}
	for _, q := range all {
		if q.Attrs().Parent != netlink.HANDLE_CLSACT {
			continue
		}
		if q.Type() != "clsact" {
			return fmt.Errorf("%w: %s has the qdisc %s", ErrOwned, p.device, q.Type())
		}
		return nil
	}
	if qdiscs != "" { // noted first: a note without a qdisc does no harm
		if err := os.MkdirAll(filepath.Join(qdiscs, strconv.Itoa(p.ifindex)), 0o700); err != nil {
			return fmt.Errorf("note qdisc: %w", err)
		}
	}
	dev, err := netlink.LinkByIndex(p.ifindex)
	if err != nil {
		return fmt.Errorf("find device of %s: %w", p, err)
	}
	err = netlink.QdiscAdd(p.clsact())
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("add qdisc clsact: %w", err)
	}
	if dev.Attrs().TxQLen == 0 { // Linux gives a device without queue a length with its first qdisc; clsact has none
		if err := netlink.LinkSetTxQLen(dev, 0); err != nil {
			return fmt.Errorf("leave queue length of %s: %w", p, err)
		}
	}
	return nil
}

// checkPriority refuses a place where somebody else has priority 1: nobody's filters are touched.
func checkPriority(p place) error {
	all, err := netlink.FilterList(p.link(), p.parent())
	if err != nil {
		return fmt.Errorf("list filters: %w", err)
	}
	for _, f := range all {
		if a := f.Attrs(); a.Priority == filterPriority {
			return fmt.Errorf("%w: %s has a filter %s with priority %d", ErrOwned, p, describeFilter(f), a.Priority)
		}
	}
	return nil
}

func describeFilter(f netlink.Filter) string {
	if b, ok := f.(*netlink.BpfFilter); ok {
		return fmt.Sprintf("bpf %q", b.Name)
	}
	return f.Type()
}

func (p place) link() netlink.Link {
	return &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: p.ifindex, Name: p.device}}
}

func (p place) parent() uint32 {
	if p.attach == ebpf.AttachTCXEgress {
		return netlink.HANDLE_MIN_EGRESS
	}
	return netlink.HANDLE_MIN_INGRESS
}

func (p place) clsact() netlink.Qdisc {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: p.ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
}

func (h *filter) attrs() netlink.FilterAttrs {
	return netlink.FilterAttrs{LinkIndex: h.place.ifindex, Parent: h.place.parent(), Handle: h.handle,
		Protocol: unix.ETH_P_ALL, Priority: filterPriority}
}

// put adds the filter, or exchanges its program: the kernel does that in one step.
func (h *filter) put(prog *ebpf.Program) error {
	info, err := prog.Info()
	if err != nil {
		return fmt.Errorf("read program: %w", err)
	}
	f := &netlink.BpfFilter{FilterAttrs: h.attrs(), Fd: prog.FD(), Name: info.Name, DirectAction: true}
	if err := netlink.FilterReplace(f); err != nil {
		return fmt.Errorf("put filter: %w", err)
	}
	return nil
}

// read gives nil if the filter is gone.
func (h *filter) read() (*netlink.BpfFilter, error) {
	all, err := bpfFilters(h.place)
	if err != nil {
		return nil, err
	}
	for _, f := range all {
		if f.Handle == h.handle && f.Priority == filterPriority {
			return f, nil
		}
	}
	return nil, nil
}

func (h *filter) there() bool {
	f, err := h.read()
	return err == nil && f != nil
}

func (h *filter) first() (bool, error) {
	all, err := netlink.FilterList(h.place.link(), h.place.parent())
	if err != nil {
		return false, fmt.Errorf("list filters: %w", err)
	}
	for _, f := range all {
		if a := f.Attrs(); a.Handle != 0 { // the row of the priority itself has none
			return a.Priority == filterPriority && a.Handle == h.handle, nil
		}
	}
	return false, nil
}

func (h *filter) lead(prog *ebpf.Program, _ string) (hold, error) {
	all, err := bpfFilters(h.place)
	if err != nil {
		return h, err
	}
	ahead := &filter{place: h.place, handle: filterHandle}
	for slices.ContainsFunc(all, func(f *netlink.BpfFilter) bool { return f.Handle == ahead.handle && f.Priority == filterPriority }) {
		ahead.handle++
	}
	if err := ahead.put(prog); err != nil {
		return h, err
	}
	return ahead, h.drop()
}

func (h *filter) update(prog *ebpf.Program) error {
	f, err := h.read()
	if err != nil {
		return err
	}
	if f != nil {
		if same, err := sameProgram(ebpf.ProgramID(f.Id), prog); same || err != nil {
			return err
		}
	}
	return h.put(prog)
}

func (h *filter) is(f found) bool { return f.filter == h.handle && f.place.attach == h.place.attach }

func (h *filter) drop() error {
	err := netlink.FilterDel(&netlink.BpfFilter{FilterAttrs: h.attrs()})
	if err != nil && !isGone(err) {
		return fmt.Errorf("delete filter: %w", err)
	}
	return nil
}

func (h *filter) close() error { return nil }

// isGone says that the device, its qdisc or the filter is not there any more.
func isGone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL)
}

// bpfFilters are those of one place, first to run first.
func bpfFilters(p place) ([]*netlink.BpfFilter, error) {
	all, err := netlink.FilterList(p.link(), p.parent())
	if err != nil && !isGone(err) {
		return nil, fmt.Errorf("list filters: %w", err)
	}
	var out []*netlink.BpfFilter
	for _, f := range all {
		if b, ok := f.(*netlink.BpfFilter); ok && b.Handle != 0 {
			out = append(out, b)
		}
	}
	return out, nil
}

// clsactChain lists the filters of a place that run BPF programs at our priority, ours and others'.
func clsactChain(p place) ([]found, error) {
	all, err := bpfFilters(p)
	if err != nil {
		return nil, err
	}
	var chain []found
	for _, f := range all {
		name, err := programName(ebpf.ProgramID(f.Id))
		if err != nil {
			return nil, err
		}
		if f.Priority == filterPriority {
			chain = append(chain, found{name: name, program: ebpf.ProgramID(f.Id), filter: f.Handle, place: p})
		}
	}
	return chain, nil
}

// dropQdisc removes a clsact that we made, with our filters in it, and says how many these were. One
// that somebody else uses stays.
func dropQdisc(ifindex int) (filters int, err error) {
	p := place{ifindex: ifindex, device: fmt.Sprintf("device %d", ifindex)}
	for _, attach := range directions() {
		p.attach = attach
		dropped, err := clearBut(p, nil)
		filters += len(dropped)
		if err != nil {
			return filters, err
		}
	}
	for _, attach := range directions() {
		p.attach = attach
		rest, err := netlink.FilterList(p.link(), p.parent())
		if err != nil && !isGone(err) {
			return filters, fmt.Errorf("list filters: %w", err)
		}
		if len(rest) > 0 {
			return filters, nil
		}
	}
	if err := netlink.QdiscDel(p.clsact()); err != nil && !isGone(err) {
		return filters, fmt.Errorf("delete qdisc clsact of %s: %w", p.device, err)
	}
	return filters, nil
}

func directions() []ebpf.AttachType {
	return []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress}
}
