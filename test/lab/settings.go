package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Settings are the sysctls, rules, routes and netfilter rules of a namespace, by what they are about.
type Settings map[string]string

// Settings reads them all. It needs nft for netfilter.
func (n *Namespace) Settings(ctx context.Context) (Settings, error) {
	s := Settings{}
	if err := n.Do(s.sysctls); err != nil {
		return nil, fmt.Errorf("read sysctls of %s: %w", n.Name, err)
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		if err := s.routing(n.Netlink, family); err != nil {
			return nil, fmt.Errorf("read routing of %s: %w", n.Name, err)
		}
	}
	ruleset, err := n.Run(ctx, "nft", "--stateless", "list", "ruleset")
	if err != nil {
		return nil, fmt.Errorf("read netfilter of %s: %w", n.Name, err)
	}
	s["netfilter"] = ruleset
	return s, nil
}

// Differences tells what is new, gone or different in after, in a stable order. Keys with one of the
// parts in them are left out.
func (s Settings) Differences(after Settings, without ...string) []string {
	all := maps.Clone(s)
	maps.Copy(all, after)
	var found []string
	for _, key := range slices.Sorted(maps.Keys(all)) {
		old, was := s[key]
		now, is := after[key]
		if was == is && old == now || slices.ContainsFunc(without, func(p string) bool { return strings.Contains(key, p) }) {
			continue
		}
		found = append(found, fmt.Sprintf("%s: %q (there: %v), was %q (there: %v)", key, now, is, old, was))
	}
	return found
}

// sysctls reads those of the calling thread's namespace. What only counts is no setting.
func (s Settings) sysctls() error {
	return filepath.WalkDir("/proc/sys/net", func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // its device is gone
		}
		if err != nil || d.IsDir() || d.Name() == "nf_conntrack_count" {
			return err
		}
		if b, err := os.ReadFile(path); err == nil { // some can only be written
			s["sysctl "+strings.TrimPrefix(path, "/proc/sys/")] = strings.TrimSpace(string(b))
		}
		return nil
	})
}

func (s Settings) routing(h *netlink.Handle, family int) error {
	rules, err := h.RuleList(family)
	if err != nil {
		return fmt.Errorf("list rules: %w", err)
	}
	for _, r := range rules {
		s[fmt.Sprintf("rule of family %d: %v", family, r)] = "there"
	}
	routes, err := h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		name := fmt.Sprint(r.LinkIndex)
		if dev, err := h.LinkByIndex(r.LinkIndex); err == nil {
			name = dev.Attrs().Name
		}
		s[fmt.Sprintf("route of family %d by /%s/: %v", family, name, r)] = "there"
	}
	return nil
}
