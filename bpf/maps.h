/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_MAPS_H
#define SP_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "types.h"

#define SP_PORT_WORDS 1024	/* of each protocol in sp_ports */

/* Written once at set-up. Empty: every packet to a protected port is dropped (NO_CONFIG). */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct sp_config);
} sp_config SEC(".maps");

/* Renewed by the agent every second. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct sp_lease);
} sp_lease SEC(".maps");

/* The fast exit: read before anything else. The agent sets bits before it swaps the services in
 * and clears them after, so it always covers the table. Port 0 of TCP says whether there is any
 * service at all. 16 KiB for TCP and as much for UDP. The words of services that are not enforced lie beside
 * those of services that are: a packet still costs one element for each of its ports.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2 * SP_PORT_WORDS);
	__type(key, __u32);
	__type(value, struct sp_ports);
} sp_ports SEC(".maps");

/* Covers the services table in the same way. Read only where parsing fails. Cannot be full: sized
 * with the services.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct sp_owner_key);
	__type(value, struct sp_owner);
} sp_owners SEC(".maps");

/* Protected services: slot 0 holds the whole table, replaced in one step: also for a service that is enforced from
 * then on, or no more. Empty: nothing is protected, which only uninstall and the first start show.
 */
struct sp_service_table {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct sp_service_key);
	__type(value, struct sp_service);
} sp_table SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct sp_service_table);
} sp_services SEC(".maps") = {
	.values = { &sp_table },
};

/* SYN only: client, service and port to path slot. Written and cleared by the agent; a stale entry
 * is harmless, the slot's epoch and state decide.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct sp_path_key);
	__type(value, struct sp_path_ref);
} sp_path_index SEC(".maps");

/* Written where a socket of this node sends a SYN to a protected port, read once where a hook decides on it. The oldest go
 * first; a SYN of which nothing is known is nobody's.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct sp_flow_key);
	__type(value, struct sp_speaker);
} sp_speakers SEC(".maps");

/* Whose socket opened the flow of a tuple: written where a socket of this node sends a SYN to a protected port, marked where a
 * hook takes that very SYN, read by the agent. Decides nothing. The oldest go first; of those the agent knows nothing.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 32768);
	__type(key, struct sp_flow_key);
	__type(value, struct sp_caller);
} sp_callers SEC(".maps");

/* One slot a path. The agent writes a slot only while its state is FREE; the programs add to the
 * counters.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct sp_path);
} sp_paths SEC(".maps");

/* One u32 a path, so that one store ends it: bpftool map update ... value 3 0 0 0 revokes. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct sp_path_status);
} sp_path_state SEC(".maps");

/* What the agent knows of devices. One that is missing is held to nothing. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct sp_device);
} sp_devices SEC(".maps");

/* By the cookie of a network namespace (SO_NETNS_COOKIE), which is never given twice. One that is missing has those ports
 * closed that some pods have protected. Full: the agent says so, and what does not fit stays closed.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct sp_decided);
} sp_decided SEC(".maps");

/* Leases of the paths' budgets, one slot a path and CPU. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct sp_budget);
} sp_budget SEC(".maps");

/* Bypassed flows. Not LRU: a flood must not cut live ones. Full: the SYN goes to the proxy. Entries
 * of ended flows stay until the agent has taken their counters.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, struct sp_flow_key);
	__type(value, struct sp_flow);
} sp_flows SEC(".maps");

/* Proxied flows, both halves. Full: the SYN is dropped (LEGS_FULL). */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 131072);
	__type(key, struct sp_leg_key);
	__type(value, struct sp_leg);
} sp_legs SEC(".maps");

/* Where the RST that answers a stray goes. LRU: losing one costs a client its quick reset. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct sp_leg_key);
	__type(value, struct sp_leg);
} sp_strays SEC(".maps");

/* LRU: losing one refuses the proxy's next dial for that client (PX_NO_ORIGIN) until its next SYN. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct sp_origin_key);
	__type(value, struct sp_origin);
} sp_origins SEC(".maps");

/* Sources that no packet from an uplink may have: what the node and its pods have themselves, and the
 * deny list. Read by XDP only. Full: the agent says so, and the rest is not refused.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct sp_prefix);
	__type(value, struct sp_source);
} sp_sources SEC(".maps");

/* Empty: no limits. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct sp_syn_limits);
} sp_syn_limits SEC(".maps");

/* Token buckets of sources (an IPv4 address, an IPv6 /64) and of services. Shared by all CPUs. LRU: one
 * that is forgotten is full again.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct sp_addr);
	__type(value, struct sp_bucket);
} sp_syn_sources SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, __u32);
	__type(value, struct sp_bucket);
} sp_syn_services SEC(".maps");

/* Packets and bytes by reason. Unprotected packets are not counted. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 128);
	__type(key, __u32);
	__type(value, struct sp_counter);
} sp_counters SEC(".maps");

/* Refused by the backstop. LRU: losing one costs a device its count, never the refusal. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct sp_backstop_key);
	__type(value, struct sp_backstop);
} sp_backstop SEC(".maps");

/* By service id. The agent makes the rows; a service without one is not counted. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct sp_traffic);
} sp_traffic SEC(".maps");

/* One record a second for equal denials; the rest is counted here. Full: counted as lost. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct sp_deny_key);
	__type(value, struct sp_deny);
} sp_denies SEC(".maps");

/* By service id: those that are not enforced. The agent makes the rows; a service without one is not counted. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct sp_watched);
} sp_watched SEC(".maps");

/* As sp_denies, of what was seen of services that are not enforced: it takes no room from denials. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct sp_deny_key);
	__type(value, struct sp_deny);
} sp_sightings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct sp_sequence);
} sp_sequence SEC(".maps");

/* First fragments that passed. LRU: losing one drops the rest of its datagram (ORPHAN). */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct sp_fragment_key);
	__type(value, struct sp_fragment);
} sp_fragments SEC(".maps");

/* Bounds the ICMP errors that tell senders of datagrams of a refusal. None left: dropped in silence. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct sp_tokens);
} sp_tokens SEC(".maps");

/* OPEN and END. No room for an OPEN: no bypass. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 2 * 1024 * 1024);
} sp_must_deliver SEC(".maps");

/* DENY, BACKSTOP, WATCHED. No room: counted as lost. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4 * 1024 * 1024);
} sp_best_effort SEC(".maps");

#endif
