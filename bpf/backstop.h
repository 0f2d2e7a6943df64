/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_BACKSTOP_H
#define SP_BACKSTOP_H

/*
 * The backstop: what stands between a packet and a socket, wherever the packet came in. It sees what no
 * device hook saw: a device that was never hooked, a pod in its first millisecond, what came out of a
 * fragment queue or a tunnel. It admits what a leg or a live path explains, and grants nothing itself.
 *
 * sp_cg_in runs for each packet of each socket below a control group, in every network namespace.
 * sp_sklookup runs in the host's namespace when a socket is looked for, so that a refused client is told
 * at once; another program there may overrule it, and sp_cg_in stands behind it.
 */

#include "device.h"

#define SP_CG_DROP 0
#define SP_CG_PASS 1
#define SP_SOCK_RAW 3

/* More of the kernel's own types than socket.h has. */
struct bpf_sk_lookup___sp {
	__u32 ingress_ifindex;
} __attribute__((preserve_access_index));

struct kernfs_node___sp {
	__u64 id;
} __attribute__((preserve_access_index));

struct cgroup___sp {
	struct kernfs_node___sp *kn;
} __attribute__((preserve_access_index));

struct css_set___sp {
	struct cgroup___sp *dfl_cgrp;
} __attribute__((preserve_access_index));

typedef struct {
	__u32 val;
} __attribute__((preserve_access_index)) kuid_t___sp, kgid_t___sp;

struct cred___sp {
	kuid_t___sp euid;
	kgid_t___sp egid;
} __attribute__((preserve_access_index));

struct task_struct___sp {
	int tgid;
	__u64 start_boottime;
	struct task_struct___sp *group_leader;
	struct css_set___sp *cgroups;
	const struct cred___sp *real_cred;
} __attribute__((preserve_access_index));

/* What the socket side knows of a packet: beside the packet, where it is and who gets it. */
struct sp_delivery {
	struct sp_service *svc;
	__u64 cookie;		/* of the network namespace; 0: not known, which counts as the host's */
	__u32 netns;		/* its inode */
};

__noinline int sp_count_socket(struct __sk_buff *skb, const struct sp_packet *p,
				      __u32 service_id, __u32 reason)
{
	struct sp_traffic *t = sp_get_traffic(service_id);
	struct sp_volume *v;

	if (!t || !p)
		return 0;
	v = reason == SP_REASON_SOCKET_LEG ? &t->socket_leg :
	    reason == SP_REASON_SOCKET_PATH ? &t->socket_path : &t->socket_loopback;
	sp_add_volume(v, p, sp_payload(skb, p));
	return 0;
}

/* Is there a live path that this flow goes under? */
static __always_inline bool sp_flow_lives(const struct sp_config *cfg, const struct sp_flow *flow,
					  __u32 service_id)
{
	struct sp_path *path;

	return !flow->ended && flow->service_id == service_id &&
	       !sp_udp_idle(flow, bpf_ktime_get_boot_ns()) &&
	       sp_path_check(cfg, flow->slot, flow->epoch, bpf_ktime_get_boot_ns(), &path) ==
		       SP_REASON_PATH_LIVE;
}

/*
 * Why a socket may have a packet of this tuple, or why not. A flow whose path is over was admitted by a
 * hook that saw it a moment ago: nobody came around. A RST opens nothing and ends what should
 * end, so it passes where the flow is known, or as the answer to a stray.
 */
static __noinline int sp_explain(const struct sp_flow_key *key, __u32 service_id, __u32 tcp_flags)
{
	struct sp_config *cfg = sp_get_config();
	struct sp_flow *flow;
	struct sp_leg_key at;
	bool tcp;

	if (!cfg || !key)
		return SP_REASON_BACKSTOP;
	tcp = key->protocol == IPPROTO_TCP; /* the proxy carries nothing else, and its keys do not say so */
	if (tcp && sp_find_leg(key, SP_LEG_UP, 0))
		return SP_REASON_SOCKET_LEG;
	flow = bpf_map_lookup_elem(&sp_flows, key);
	if (flow && sp_flow_lives(cfg, flow, service_id))
		return SP_REASON_SOCKET_PATH;
	if (flow)
		return tcp_flags & SP_TCP_RST ? SP_REASON_SOCKET_RESET : SP_REASON_SOCKET_ENDED;
	if (!tcp || !(tcp_flags & SP_TCP_RST))
		return SP_REASON_BACKSTOP;
	at = sp_leg_key(&key->client, key->client_port, &key->server, key->server_port, SP_LEG_UP);
	if (bpf_map_lookup_elem(&sp_strays, &at))
		return SP_REASON_SOCKET_RESET;
	at.side = SP_LEG_DOWN; /* made of the packet that ended a flow, which may be swept by now */
	return bpf_map_lookup_elem(&sp_strays, &at) ? SP_REASON_SOCKET_RESET : SP_REASON_BACKSTOP;
}

static __always_inline bool sp_refuses(enum sp_reason reason)
{
	return reason == SP_REASON_BACKSTOP || reason == SP_REASON_LOOPBACK_DENIED ||
	       reason == SP_REASON_SOCKET_ENDED || reason == SP_REASON_NO_CONFIG;
}

/* Counts a refusal for the device that it came in by. */
__noinline int sp_count_device(__u32 netns, __u32 ifindex, __u32 packets, __u64 bytes)
{
	struct sp_backstop_key at = { .netns = netns, .ifindex = ifindex };
	struct sp_backstop fresh = {}, *b;

	b = bpf_map_lookup_elem(&sp_backstop, &at);
	if (!b) {
		bpf_map_update_elem(&sp_backstop, &at, &fresh, BPF_NOEXIST);
		b = bpf_map_lookup_elem(&sp_backstop, &at);
		if (!b)
			return 0;
	}
	__sync_fetch_and_add(&b->packets, packets);
	__sync_fetch_and_add(&b->bytes, bytes);
	b->last_ns = bpf_ktime_get_boot_ns();
	return 1;
}

/* The alarm. */
__noinline int sp_record_backstop(const struct sp_flow_key *key, __u32 reason, __u32 ifindex,
					 __u32 netns, __u32 service_id)
{
	struct sp_sequence *seq = sp_get_sequence();
	struct sp_event *e;

	if (!seq || !key)
		return 0;
	e = sp_begin_denial(seq, key, reason, SP_EVENT_BACKSTOP);
	if (!e)
		return 0;
	e->ifindex = ifindex;
	e->netns = netns;
	e->service_id = service_id;
	sp_submit(e, &seq->best_effort_woken_ns);
	return 1;
}

/*
 * The protected service that a packet at a socket is for. By the port in the packet, and by that of the
 * socket, which another program may have chosen for it. A service of the host is in its namespace only.
 */
static __always_inline struct sp_service *sp_service_at(const struct sp_config *cfg, __u64 cookie,
							const struct sp_addr *address, __u16 port,
							__u8 protocol)
{
	struct sp_service *svc;

	if (!sp_port_flagged(protocol, port))
		return NULL;
	svc = sp_find_own(address, port, protocol);
	if (svc && svc->target == SP_TARGET_HOST && cfg && !sp_is_host(cfg, cookie))
		return NULL;
	return svc;
}

static __always_inline enum sp_reason sp_decide_socket(const struct sp_config *cfg,
						       const struct sp_packet *p,
						       const struct sp_flow_key *key,
						       const struct sp_delivery *d)
{
	enum sp_reason reason;

	if (!cfg)
		return SP_REASON_NO_CONFIG;
	reason = sp_explain(key, d->svc->id, p->tcp_flags);
	if (reason == SP_REASON_BACKSTOP && d->svc->target == SP_TARGET_POD &&
	    p->ifindex == SP_LO_IFINDEX && !sp_is_host(cfg, d->cookie))
		return cfg->deny_pod_loopback ? SP_REASON_LOOPBACK_DENIED : SP_REASON_POD_LOOPBACK;
	return reason;
}

/*
 * Is it for a pod, from elsewhere, at an address that no table lists: of its link, or a group's? A pod with such
 * a port may be the one. Of TCP the SYN is enough: a client in the pod may have the port by chance.
 */
static __always_inline bool sp_is_unlisted_at(const struct sp_config *cfg, const struct sp_packet *p,
					      const struct sp_delivery *d)
{
	if (!sp_has_ports(p->protocol) || !sp_port_flagged(p->protocol, p->dport) ||
	    p->ifindex == SP_LO_IFINDEX || !cfg || sp_is_host(cfg, d->cookie))
		return false;
	if (p->protocol == IPPROTO_TCP && !sp_syn_only(p))
		return false;
	return sp_is_link_scope(&p->dst, p->version) || sp_is_group(&p->dst, p->version);
}

/* What the socket tells of a packet. */
struct sp_owner_socket {
	__u16 port;
	__u8 protocol;
	bool counts;		/* the packet's volume can be compared with that of the hooks */
};

/*
 * Is it for a port that some pods have protected, in a namespace of which the agent has not said whose it is? Every pod
 * begins so, whichever way its first packet comes; and so does one end that the cluster does not know any more, with the
 * connections that it still has. What a pod sends to itself is none of a stranger's.
 */
static __always_inline bool sp_is_undecided(const struct sp_config *cfg, const struct sp_packet *p,
					    const struct sp_delivery *d, const struct sp_owner_socket *sock)
{
	__u64 cookie = d->cookie;

	if (!cfg || p->ifindex == SP_LO_IFINDEX || cookie == cfg->host_netns)
		return false;
	if (!sp_pod_serves(SP_UNDECIDED_DEVICE, p->dport, p->protocol) &&
	    !sp_pod_serves(SP_UNDECIDED_DEVICE, sock->port, sock->protocol))
		return false;
	return !bpf_map_lookup_elem(&sp_decided, &cookie);
}

/*
 * Not compared with the hooks: copies that raw sockets get, and what meets a listener that is no SYN,
 * because the kernel shows the end of a handshake twice when two of them race.
 */
static __always_inline void sp_look_at_socket(struct __sk_buff *skb, const struct sp_packet *p,
					      enum sp_parse parsed, struct sp_owner_socket *sock)
{
	struct bpf_sock *sk = skb->sk;

	if (sk)
		sk = bpf_sk_fullsock(sk);
	if (!sk)
		return;
	sock->port = sk->src_port;
	sock->protocol = sk->protocol;
	sock->counts = sp_ports_read(parsed) && sk->type != SP_SOCK_RAW &&
		       (sk->state != SP_TCP_LISTEN || sp_syn_only(p));
}

/* A packet with a protected port, in the packet or at the socket. */
static __always_inline int sp_deliver(struct __sk_buff *skb, struct sp_packet *p,
				      struct sp_flow_key *key, const struct sp_owner_socket *sock)
{
	struct sp_config *cfg = sp_get_config();
	struct net___sp *net = sp_netns_of(skb);
	struct sp_delivery d = {};
	enum sp_reason reason = SP_REASON_BACKSTOP;

	if (net) {
		d.cookie = BPF_CORE_READ(net, net_cookie);
		d.netns = BPF_CORE_READ(net, ns.inum);
	}
	if (cfg && d.cookie && d.cookie == cfg->px_netns)
		return SP_CG_PASS;
	sp_parse_addresses(skb, p);
	d.svc = sp_service_at(cfg, d.cookie, &p->dst, p->dport, p->protocol);
	if (!d.svc)
		d.svc = sp_service_at(cfg, d.cookie, &p->dst, sock->port, sock->protocol);
	if (!d.svc && sp_is_undecided(cfg, p, &d, sock))
		reason = SP_REASON_UNDECIDED;
	else if (!d.svc && !sp_is_unlisted_at(cfg, p, &d))
		return SP_CG_PASS;
	sp_parse_volume(skb, p);
	*key = sp_key_towards(p);
	if (d.svc)
		reason = sp_decide_socket(cfg, p, key, &d);
	sp_count(reason, p->segments, p->bytes);
	if (reason == SP_REASON_UNDECIDED) { /* nobody came around anything: it is early */
		sp_record_deny(key, reason, 0);
		return SP_CG_DROP;
	}
	if (!sp_refuses(reason)) {
		if (d.svc && sock->counts && reason != SP_REASON_SOCKET_RESET)
			sp_count_socket(skb, p, d.svc->id, reason);
		return SP_CG_PASS;
	}
	if (reason != SP_REASON_SOCKET_ENDED) {
		sp_count_device(d.netns, p->ifindex, p->segments, p->bytes);
		sp_record_backstop(key, reason, p->ifindex, d.netns, d.svc ? d.svc->id : 0);
	}
	return SP_CG_DROP;
}

/* Is it none of our business? By the packet's port, and by the socket's if that is another. */
static __always_inline bool sp_unprotected(struct __sk_buff *skb, const struct sp_head *head)
{
	struct bpf_sock *sk = skb->sk;
	__u16 port;

	if (sp_port_flagged(head->protocol, head->dport))
		return false;
	port = sk ? sk->src_port : head->dport;
	return port == head->dport || !sp_port_flagged(head->protocol, port);
}

/*
 * Ingress of a control group. What cannot be parsed has no port of its own, and that of its socket
 * stands for it.
 */
static __always_inline int sp_backstop_in(struct __sk_buff *skb)
{
	struct sp_owner_socket sock = {};
	struct sp_scratch *scratch;
	struct sp_head head = {};
	enum sp_parse parsed;

	parsed = sp_parse_linear(skb, &head, 0);
	if (parsed == SP_PARSE_OTHER || (sp_ports_read(parsed) && sp_unprotected(skb, &head)))
		return SP_CG_PASS;
	scratch = sp_get_scratch();
	if (!scratch)
		return SP_CG_DROP;
	sp_packet_begin(skb, &scratch->packet, &head);
	sp_look_at_socket(skb, &scratch->packet, parsed, &sock);
	return sp_deliver(skb, &scratch->packet, &scratch->key, &sock);
}

/* ---- who sends a SYN ---- */

static __always_inline void sp_socket_addr(struct sp_addr *a, __u32 family, __u32 v4, __u32 w0, __u32 w1,
					   __u32 w2, __u32 w3)
{
	__u32 *word = (__u32 *)a;
	bool six = family != SP_AF_INET;

	word[0] = six ? w0 : 0;
	word[1] = six ? w1 : 0;
	word[2] = six ? w2 : bpf_htonl(0xffff);
	word[3] = six ? w3 : v4;
}

/*
 * The process that sends, if it is the one that the packet is sent for: it holds the socket's lock, which no timer
 * and no interrupt that sends in its place ever does. Whoever else is on this CPU has nothing to do with it.
 */
static __always_inline void sp_sending_process(struct __sk_buff *skb, struct sp_caller *caller)
{
	struct sock___sp *sk = sp_kernel_socket(skb);
	struct task_struct___sp *task;

	if (!sk || !BPF_CORE_READ(sk, sk_lock.owned))
		return;
	task = (void *)bpf_get_current_task();
	caller->pid = BPF_CORE_READ(task, tgid);
	caller->started_ns = BPF_CORE_READ(task, group_leader, start_boottime);
	caller->process_cgroup = BPF_CORE_READ(task, cgroups, dfl_cgrp, kn, id);
	caller->user = BPF_CORE_READ(task, real_cred, euid.val);
	caller->users_group = BPF_CORE_READ(task, real_cred, egid.val);
}

/* A SYN that is sent again is of the process that sent it first. */
static __noinline int sp_note_caller(struct __sk_buff *skb, const struct sp_flow_key *key, __u64 cgroup, __u64 now)
{
	struct sp_caller caller = { .cgroup = cgroup, .said_ns = now }, *before;
	struct bpf_sock *sk = skb->sk;
	struct bpf_tcp_sock *tcp;

	if (!sk || !key)
		return 0;
	tcp = bpf_tcp_sock(sk);
	if (!tcp)
		return 0;
	caller.sequence = tcp->snd_una;
	caller.cookie = bpf_get_socket_cookie(skb);
	before = bpf_map_lookup_elem(&sp_callers, key);
	if (before && before->cookie == caller.cookie && before->sequence == caller.sequence) {
		before->said_ns = now;
		return 1;
	}
	sp_sending_process(skb, &caller);
	return !bpf_map_update_elem(&sp_callers, key, &caller, BPF_ANY);
}

/*
 * Egress of a control group: notes whose socket sends a SYN to a protected port. Behind the socket nobody can tell any more:
 * loopback takes the owner off the packet. Only what connects is looked at, and nothing is ever refused here: a SYN
 * without a note has no path that is bound to a control group.
 */
static __always_inline int sp_note_speaker(struct __sk_buff *skb)
{
	volatile struct bpf_sock *sk = skb->sk;
	struct sp_speaker speaker = {};
	struct sp_flow_key key = {};
	struct sp_ports *ports;

	if (!sk || sk->state != SP_TCP_SYN_SENT)
		return SP_CG_PASS;
	key.protocol = IPPROTO_TCP;
	key.server_port = bpf_ntohs((__u16)sk->dst_port);
	ports = sp_ports_with(IPPROTO_TCP, key.server_port);
	if (!ports || !(sp_any_of(ports, key.server_port) & 1))
		return SP_CG_PASS;
	key.client_port = sk->src_port;
	sp_socket_addr(&key.client, sk->family, sk->src_ip4, sk->src_ip6[0], sk->src_ip6[1], sk->src_ip6[2], sk->src_ip6[3]);
	sp_socket_addr(&key.server, sk->family, sk->dst_ip4, sk->dst_ip6[0], sk->dst_ip6[1], sk->dst_ip6[2], sk->dst_ip6[3]);
	speaker.cgroup = bpf_skb_cgroup_id(skb);
	speaker.said_ns = bpf_ktime_get_boot_ns();
	if (speaker.cgroup)
		bpf_map_update_elem(&sp_speakers, &key, &speaker, BPF_ANY);
	sp_note_caller(skb, &key, speaker.cgroup, speaker.said_ns);
	return SP_CG_PASS;
}

/* ---- socket look-up in the host's namespace ---- */

static __always_inline __u32 sp_ingress_ifindex(struct bpf_sk_lookup *ctx)
{
	struct bpf_sk_lookup___sp *k = (void *)ctx;

	return bpf_core_field_exists(k->ingress_ifindex) ? k->ingress_ifindex : 0; /* since 5.17 */
}

/* Each field of the context is loaded for itself: the verifier takes no address of one. */
static __always_inline struct sp_flow_key sp_lookup_key(volatile struct bpf_sk_lookup *ctx)
{
	struct sp_flow_key key = { .protocol = ctx->protocol };

	sp_socket_addr(&key.client, ctx->family, ctx->remote_ip4, ctx->remote_ip6[0],
		       ctx->remote_ip6[1], ctx->remote_ip6[2], ctx->remote_ip6[3]);
	sp_socket_addr(&key.server, ctx->family, ctx->local_ip4, ctx->local_ip6[0],
		       ctx->local_ip6[1], ctx->local_ip6[2], ctx->local_ip6[3]);
	key.client_port = bpf_ntohs(ctx->remote_port);
	key.server_port = ctx->local_port;
	return key;
}

/* It may be a RST, which cannot be told here: what would let one pass lets all of its tuple pass, and
 * sp_cg_in looks again.
 */
static __always_inline int sp_look_up(struct bpf_sk_lookup *ctx)
{
	struct sp_config *cfg = sp_get_config();
	__u32 netns = cfg ? cfg->host_netns_inode : 0;
	__u32 ifindex = sp_ingress_ifindex(ctx);
	struct sp_flow_key key;
	struct sp_service *svc;
	enum sp_reason reason;

	if (!sp_port_flagged(ctx->protocol, ctx->local_port))
		return SK_PASS;
	key = sp_lookup_key(ctx);
	svc = sp_find_own(&key.server, key.server_port, ctx->protocol);
	if (!svc)
		return SK_PASS;
	reason = sp_explain(&key, svc->id, SP_TCP_RST);
	if (!sp_refuses(reason))
		return SK_PASS;
	sp_count(reason, 1, 0);
	sp_count_device(netns, ifindex, 1, 0);
	sp_record_backstop(&key, reason, ifindex, netns, svc->id);
	return SK_DROP;
}

#endif
