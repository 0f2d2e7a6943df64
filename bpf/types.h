/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_TYPES_H
#define SP_TYPES_H

/*
 * Keys and values of every map, and the records of the rings. Go gets them by BTF; a dump by
 * bpftool is meant to be read alone. Ports are in host order, times are CLOCK_BOOTTIME
 * nanoseconds, addresses are 16 bytes with IPv4 in its mapped form (::ffff:a.b.c.d).
 * A change here shows in pkg/datapath/testdata/layout.golden and needs a new SP_SCHEMA.
 */

#include <stdbool.h>
#include <stddef.h>
#include <linux/types.h>
#include <linux/bpf.h>

#include "reason.h"

#define SP_SCHEMA 4
#define SP_LABEL 32

struct sp_addr {
	__u8 bytes[16];
} __attribute__((aligned(8)));

/* Where the sockets of a protected service live. */
enum sp_target {
	SP_TARGET_NONE = 0,
	SP_TARGET_HOST = 1,	/* in the host network namespace */
	SP_TARGET_POD = 2,	/* behind the device `ifindex` */
	SP_TARGET_REMOTE = 3,	/* on another node: steered where a workload of this one asks for it */
};

/* The hook that a flow lives at, from its SYN to its end. */
enum sp_hook {
	SP_HOOK_NONE = 0,
	SP_HOOK_IN = 1,		/* ingress of a device: host service, client beyond the device */
	SP_HOOK_OUT = 2,	/* egress of a device: pod service behind the device */
	SP_HOOK_LO = 3,		/* ingress of lo: host service, client on the node */
	SP_HOOK_PORT = 4,	/* egress of a bridge's port: pod service behind the port */
};

/* By what kind of device a client is reached: a path may be for one alone. */
enum sp_ingress {
	SP_INGRESS_ANY = 0,
	SP_INGRESS_UPLINK = 1,
	SP_INGRESS_POD = 2,
	SP_INGRESS_LOCAL = 3,	/* the node itself */
};

/* What the agent knows of a device: bits of sp_device.facts. */
enum sp_fact {
	SP_DEVICE_UPLINK = 1,
	SP_DEVICE_POD = 2,
	SP_DEVICE_BOUND4 = 4,	/* its pod has those IPv4 addresses that are routed to it */
	SP_DEVICE_BOUND6 = 8,
	SP_DEVICE_PODS = 16,	/* a bridge with nothing but pods behind it: whose of them a packet is, nobody knows there */
};

struct sp_device {
	enum sp_fact facts;
};

/* How far a service is protected. Those that are not enforced stand in the table under keys of their own (`watched`). */
enum sp_mode {
	SP_MODE_ENFORCE = 0,
	SP_MODE_OBSERVE = 1,	/* passes; counted */
	SP_MODE_SHADOW = 2,	/* passes; counted by what Enforce would make of it */
};

enum sp_state {
	SP_PATH_FREE = 0,
	SP_PATH_PENDING = 1,
	SP_PATH_ACTIVE = 2,
	SP_PATH_REVOKED = 3,
	SP_PATH_EXPIRED = 4,
	SP_PATH_SPENT = 5,
};

enum sp_leg_side {
	SP_LEG_NONE = 0,
	SP_LEG_DOWN = 1,	/* client to proxy */
	SP_LEG_UP = 2,		/* proxy, with the client's address, to service */
};

/* Bits of sp_flow.flags and sp_leg.flags. */
enum sp_flags {
	SP_FIN_CLIENT = 1,
	SP_FIN_SERVER = 2,
	SP_RST = 4,
	SP_ANSWERED = 8,	/* the other direction was seen, beyond its SYN: both shook hands */
	SP_CUT_SERVER = 16,	/* its path ended, and an RST of the client went on to the server */
	SP_CUT_CLIENT = 32,	/* the same, to the client */
	SP_AGAIN = 64,		/* a SYN came after both shook hands: another connection, if the service takes it */
};

struct sp_config {
	__u32 schema;
	__u32 px0_ifindex;	/* in the host namespace */
	__u32 px1_ifindex;	/* in the px namespace */
	__u32 listen_port;	/* of the proxy's transparent listeners */
	__u64 max_ttl_ns;	/* a deadline further away is invalid */
	__u64 secret[2];	/* key of the re-injection mark, new with every set-up */
	__u8 stamp[6];		/* source MAC of what our programs send to px1 */
	__u8 pad[2];
	__u64 host_netns;	/* cookies (SO_NETNS_COOKIE); 0: not set up yet */
	__u64 px_netns;
	__u32 host_netns_inode;	/* as /proc/PID/ns/net shows it */
	__u32 deny_pod_loopback;	/* 1: a pod's service is closed to the pod itself too */
	__u32 cpus;		/* that may run programs */
	__u32 pad2;
};

/* Dead-man lease: nothing new is admitted past it. */
struct sp_lease {
	__u64 until_ns;
};

/* 64 ports: bit n of TCP port 64*index+n; the UDP ports follow. A set bit means "look further", never
 * "protected".
 */
struct sp_ports {
	__u64 bits;
	__u64 watched;		/* the same for services that are not enforced */
};

/* Who owns a protected port, for packets that cannot be parsed: an address, or the pod behind a device. */
struct sp_owner_key {
	struct sp_addr address;	/* all zero: every local address */
	__u32 device;
	__u32 pad;
};

struct sp_owner {
	__u32 target;		/* enum sp_target */
};

/* No device has this number. With no address: some pods have this service, and the agent says of each whether it has. */
#define SP_UNDECIDED_DEVICE 0xffffffff

struct sp_service_key {
	struct sp_addr address;	/* all zero: every local address (host services) */
	__u16 port;
	__u8 protocol;
	__u8 watched;		/* 1: of a service that is not enforced: nothing that decides looks for it */
	__u32 device;		/* 0; or, with no address, the device behind which a pod has this service */
};

/* A network namespace of which the agent knows whose it is: what of it is protected stands in the table. */
struct sp_decided {
	char pod[64];		/* its namespace and name in the cluster, cut */
};

struct sp_service {
	__u32 id;
	enum sp_target target;
	__u32 ifindex;		/* of the pod's host-side device; 0: not known yet */
	__u32 generation;	/* of the table this row belongs to */
	__u32 udp_idle_s;	/* UDP: a flow ends after so much silence; 0: a port of TCP alone, no path opens it */
	enum sp_mode mode;
	char name[SP_LABEL];
};

/* Which path may serve a SYN: one for its client's port, else one for the control group that it comes from, else one
 * for its client's address.
 */
struct sp_path_key {
	struct sp_addr client;
	__u32 service_id;
	__u16 port;
	__u16 client_port;	/* 0: any */
	__u64 cgroup;		/* number of a control group; 0: any */
};

#define SP_NO_SLOT 0xffffffff

struct sp_path_ref {
	__u32 slot;		/* or NO_SLOT: nothing serves the whole address */
	__u32 epoch;
	__u32 bound;		/* how many paths serve some sockets of the address: the key of these is to be tried first */
	__u32 pad;
};

/* The use of a slot, as far as a flow keeps it. */
struct sp_slot {
	__u32 slot;
	__u32 epoch;
};

struct sp_path {
	__u32 epoch;		/* counts the uses of this slot */
	__u32 service_id;
	struct sp_addr client;
	__u64 deadline_ns;
	char grant[SP_LABEL];
	char service[SP_LABEL];
	__u64 flows;
	__u64 bytes_to_server;	/* IP bytes, headers included */
	__u64 bytes_to_client;
	__u64 packets_to_server;
	__u64 packets_to_client;

	/* Budgets: limits as granted, 0 for none, and what was taken of them, in leases of CPUs included. */
	__u64 bytes_limit;
	__u64 packets_limit;
	__u64 connections_limit;
	__u64 bytes_taken;
	__u64 packets_taken;
	__u64 connections_taken;
	__u64 second_ns;	/* when the second began that in_second is of */
	__u32 in_second;	/* connections admitted in it */
	__u32 rate_limit;	/* of connections in a second */
	struct bpf_spin_lock lock;	/* of what was taken, and of the second */
	enum sp_ingress ingress;

	/* Binding to sockets: of a port of the client, of a control group on this node. 0: any. */
	__u64 cgroup;
	__u32 client_port;
	__u32 pad;
};

/* Who sends the SYN of a tuple, told by its socket a moment before a hook sees it. */
struct sp_speaker {
	__u64 cgroup;
	__u64 said_ns;
};

/*
 * Whose socket a SYN is of, as it was when the SYN was sent. The process is the one that worked on the socket then,
 * which for the first SYN is the one that connected it; where nobody did (a timer sends again), pid is 0.
 */
struct sp_caller {
	__u64 cookie;		/* of the socket: never given twice */
	__u64 cgroup;		/* number of the control group that the socket was made in */
	__u64 said_ns;
	__u64 taken_ns;		/* when a hook took this SYN; 0: none has */
	__u64 process_cgroup;	/* that of the process */
	__u64 started_ns;	/* of the process, CLOCK_BOOTTIME */
	__u32 pid;		/* of the process, as the node counts them; 0: nobody knows */
	__u32 user;		/* that it was at work as, and its group, as the node counts them */
	__u32 users_group;
	__u32 sequence;		/* of the SYN: tells it from one with the same tuple in another network namespace */
};

/* What a CPU has taken ahead of a path's budget. */
struct sp_budget {
	__u32 epoch;		/* of the path: a lease of another one is void */
	__u32 pad;
	__u64 bytes_left;
	__u64 packets_left;
};

/* State of a path slot. One store ends every flow of the path. */
struct sp_path_status {
	enum sp_state state;
};

struct sp_flow_key {
	struct sp_addr client;
	struct sp_addr server;
	__u16 client_port;
	__u16 server_port;
	__u32 protocol;
};

struct sp_flow {
	__u32 slot;
	__u32 epoch;
	__u32 service_id;
	enum sp_hook hook;
	__u32 ifindex;
	__u32 flags;		/* enum sp_flags */
	enum sp_reason ended;	/* why its path no longer serves it, or NONE */
	__u32 udp_idle_s;	/* of its service, when it was opened; TCP: 0 */
	__u64 id;
	__u64 opened_ns;
	__u64 last_ns;
	__u64 bytes_to_server;
	__u64 bytes_to_client;
	__u64 packets_to_server;
	__u64 packets_to_client;
};

struct sp_leg_key {
	struct sp_addr client;
	struct sp_addr server;
	__u16 client_port;
	__u16 server_port;
	enum sp_leg_side side;
};

/* Link-layer addresses of the two parties at a bridge's port, where no neighbour look-up can be made:
 * the bridge takes the answers. Zero at other hooks.
 */
struct sp_ether {
	__u8 client[6];
	__u8 server[6];
	__u32 pad;
};

/* Where a packet of the proxy is put back. Also the value of the stray map. */
struct sp_leg {
	enum sp_hook hook;
	__u32 ifindex;
	__u32 service_id;
	__u32 flags;		/* enum sp_flags */
	__u64 opened_ns;
	__u64 last_ns;
	struct sp_ether ether;
};

/* By which device a client reached a service, for the proxy's own connection to it. */
struct sp_origin_key {
	struct sp_addr client;
	struct sp_addr server;
	__u32 server_port;
	__u32 pad;
};

struct sp_origin {
	enum sp_hook hook;
	__u32 ifindex;
	struct sp_ether ether;
};

/* A source prefix, of the mapped form: an IPv4 prefix of n bits has 96 + n. */
struct sp_prefix {
	__u32 bits;
	__u8 address[16];
};

/* Why no packet with this source may come in from outside: XDP_OWN_SOURCE or XDP_DENIED. */
struct sp_source {
	enum sp_reason reason;
};

/* How many SYNs a source and a service may get: one every interval, and burst / interval at a time. An
 * interval of 0: any number.
 */
struct sp_syn_limits {
	__u64 source_interval_ns;
	__u64 source_burst_ns;
	__u64 service_interval_ns;
	__u64 service_burst_ns;
};

/* A token bucket, as the time at which it will be full again. */
struct sp_bucket {
	__u64 full_ns;
};

struct sp_counter {
	__u64 packets;
	__u64 bytes;
};

/* What the backstop refused, by where the packet came in. `netns` is the inode of the network
 * namespace, as lsns and /proc/PID/ns/net show it; an ifindex means something only within one.
 */
struct sp_backstop_key {
	__u32 netns;
	__u32 ifindex;
};

struct sp_backstop {
	__u64 packets;
	__u64 bytes;		/* IP bytes */
	__u64 last_ns;
};

/*
 * Volumes that neither GSO nor GRO raises between a hook and a socket, so that they can be compared:
 * packets of TCP with data are split and merged on the way, their payload is not; datagrams are merged,
 * and counted for as many as they were.
 */
struct sp_volume {
	__u64 opens;		/* SYNs */
	__u64 packets;		/* others without payload; datagrams */
	__u64 bytes;		/* payload; not of datagrams, which come in fragments */
};

/* Packets towards one service: what the tc hooks let through, and what its sockets got. */
struct sp_traffic {
	struct sp_volume hook_leg;
	struct sp_volume hook_path;
	struct sp_volume socket_leg;
	struct sp_volume socket_path;
	struct sp_volume socket_loopback;	/* from the pod itself */
};

struct sp_seen {
	__u64 opens;		/* SYNs */
	__u64 packets;		/* as on the wire, SYNs included; datagrams */
	__u64 bytes;		/* IP bytes */
};

/* Packets of a service that is not enforced: all that were seen, and of a shadowed one what Enforce would have made
 * of each, if its flow had begun with it.
 */
struct sp_watched {
	struct sp_seen seen;
	struct sp_seen proxied;
	struct sp_seen bypassed;
	struct sp_seen denied;
};

/* A datagram in fragments, on one way: the hook, and the device where it goes to a pod's. */
struct sp_fragment_key {
	struct sp_addr src;
	struct sp_addr dst;
	__u32 id;
	enum sp_hook hook;
	__u32 ifindex;
	__u32 pad;
};

/* What the first fragment was. */
enum sp_fragment_kind {
	SP_FRAGMENT_NONE = 0,
	SP_FRAGMENT_FREE = 1,		/* none of ours */
	SP_FRAGMENT_TO_SERVER = 2,	/* of the bypassed flow with these ports */
	SP_FRAGMENT_TO_CLIENT = 3,
};

struct sp_fragment {
	__u64 seen_ns;
	enum sp_fragment_kind kind;
	__u16 client_port;
	__u16 server_port;
};

/* Of one CPU: how many ICMP errors it may still send. */
struct sp_tokens {
	__u64 refilled_ns;
	__u64 left;
};

struct sp_deny_key {
	struct sp_addr client;
	struct sp_addr server;
	__u16 server_port;
	__u16 protocol;
	enum sp_reason reason;
};

struct sp_deny {
	__u64 reported_ns;	/* when the last record was written */
	__u64 pending;		/* denials since */
};

/* Per CPU: how many records were produced, for either ring, and how many of them did not fit. */
struct sp_sequence {
	__u64 produced;
	__u64 must_deliver_lost;
	__u64 best_effort_lost;
	__u64 must_deliver_woken_ns;	/* when a reader was last woken, per ring */
	__u64 best_effort_woken_ns;
};

struct sp_event {
	__u64 seq;		/* per CPU over both rings, no gaps but losses */
	__u64 boot_ns;
	__u32 cpu;
	enum sp_event_kind kind;
	enum sp_verdict verdict;
	enum sp_reason reason;
	struct sp_addr client;
	struct sp_addr server;
	__u16 client_port;
	__u16 server_port;
	__u32 protocol;
	enum sp_hook hook;
	__u32 ifindex;
	__u32 service_id;
	__u32 slot;
	__u64 flow_id;
	__u32 netns;		/* of the device, for BACKSTOP; as in sp_backstop_key */
	__u32 pad;
	__u64 count;
	__u64 bytes_to_server;
	__u64 bytes_to_client;
	__u64 packets_to_server;
	__u64 packets_to_client;
	char grant[SP_LABEL];
	char service[SP_LABEL];
};

#endif
