package main

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// wanted are the modules that the suites need where a kernel does not have them built in.
var wanted = strings.Fields(`
	veth dummy tun bridge br_netfilter 8021q bonding vrf ifb macvlan ipvlan netkit
	ipip sit ip6_tunnel ip_gre ip6_gre vxlan geneve wireguard
	sch_ingress cls_bpf act_bpf sch_fq_codel
	nf_conntrack nf_nat nf_tables nft_chain_nat nft_ct nft_masq nft_redir nft_reject_inet nft_fib_inet nft_compat
	nft_objref nft_tproxy nft_socket nf_tproxy_ipv4 nf_tproxy_ipv6 nft_limit nft_log nf_log_syslog
	xfrm_user nfnetlink nfnetlink_queue nf_conntrack_netlink
	inet_diag tcp_diag udp_diag raw_diag unix_diag af_packet_diag af_packet
	mptcp_diag`)

// module is one loadable file, after those that it needs.
type module struct {
	name string
	code []byte
}

// modules reads what is wanted, in an order in which it can be loaded.
func (t tree) modules(ctx context.Context) ([]module, error) {
	files := map[string]string{}
	err := filepath.WalkDir(t.mods, func(path string, d fs.DirEntry, err error) error {
		if name, _, ok := strings.Cut(filepath.Base(path), ".ko"); ok && err == nil && !d.IsDir() {
			files[canonical(name)] = path
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list modules: %w", err)
	}
	var order []module
	var add func(name string) error
	add = func(name string) error {
		path, ok := files[canonical(name)]
		if !ok || slices.ContainsFunc(order, func(m module) bool { return m.name == canonical(name) }) {
			return nil // built in or not made for this kernel; or there already
		}
		code, err := plain(ctx, path)
		if err != nil {
			return err
		}
		needs, err := dependencies(code)
		if err != nil {
			return fmt.Errorf("read %s: %w", path, err)
		}
		for _, n := range needs {
			if err := add(n); err != nil {
				return err
			}
		}
		order = append(order, module{canonical(name), code})
		return nil
	}
	for _, name := range wanted {
		if err := add(name); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// canonical is a module's name as the kernel writes it.
func canonical(name string) string { return strings.ReplaceAll(name, "-", "_") }

// plain is a module's file, decompressed.
func plain(ctx context.Context, path string) ([]byte, error) {
	tool := map[string]string{".xz": "xz", ".zst": "zstd", ".gz": "gzip"}[filepath.Ext(path)]
	if tool == "" {
		return os.ReadFile(path)
	}
	out, err := exec.CommandContext(ctx, tool, "-dc", path).Output()
	if err != nil {
		return nil, fmt.Errorf("decompress %s: %w", path, err)
	}
	return out, nil
}

// dependencies reads what a module says it needs.
func dependencies(code []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(code))
	if err != nil {
		return nil, err
	}
	s := f.Section(".modinfo")
	if s == nil {
		return nil, fmt.Errorf("no section .modinfo")
	}
	info, err := s.Data()
	if err != nil {
		return nil, err
	}
	for _, line := range bytes.Split(info, []byte{0}) {
		if list, ok := strings.CutPrefix(string(line), "depends="); ok && list != "" {
			return strings.Split(list, ","), nil
		}
	}
	return nil, nil
}
