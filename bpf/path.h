/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_PATH_H
#define SP_PATH_H

/* Paths: may this SYN go around the proxy, and may this flow still? */

#include "budget.h"
#include "source.h"

/* The reason why a slot does not serve, or PATH_LIVE. */
static __always_inline enum sp_reason sp_path_check(const struct sp_config *cfg, __u32 slot,
						    __u32 epoch, __u64 now, struct sp_path **out)
{
	struct sp_path_status *status = bpf_map_lookup_elem(&sp_path_state, &slot);
	struct sp_path *path = bpf_map_lookup_elem(&sp_paths, &slot);

	*out = path;
	if (!status || !path || path->epoch != epoch)
		return SP_REASON_PATH_STALE;
	switch (*(volatile __u32 *)&status->state) {
	case SP_PATH_ACTIVE:
		break;
	case SP_PATH_EXPIRED:
		return SP_REASON_PATH_EXPIRED;
	case SP_PATH_SPENT:
		return SP_REASON_PATH_SPENT;
	case SP_PATH_REVOKED:
		return SP_REASON_PATH_REVOKED;
	default:
		return SP_REASON_PATH_STALE;
	}
	if (now >= path->deadline_ns || path->deadline_ns - now > cfg->max_ttl_ns)
		return SP_REASON_PATH_EXPIRED;
	return SP_REASON_PATH_LIVE;
}

static __always_inline bool sp_lease_holds(__u64 now)
{
	__u32 zero = 0;
	struct sp_lease *lease = bpf_map_lookup_elem(&sp_lease, &zero);

	return lease && now < lease->until_ns;
}

/* Marks a flow as ended, once, and says so in a record. */
static __always_inline void sp_end_flow(const struct sp_flow_key *key, struct sp_flow *flow,
					enum sp_reason reason)
{
	if (__sync_val_compare_and_swap((__u32 *)&flow->ended, SP_REASON_NONE, reason))
		return;
	sp_record_flow(key, flow, SP_EVENT_END, reason);
}

/*
 * One packet of a bypassed flow: PATH_LIVE, and it is accounted; or the reason why its path no longer
 * serves it.
 */
static __always_inline enum sp_reason sp_flow_packet(const struct sp_config *cfg,
						     const struct sp_flow_key *key,
						     struct sp_flow *flow, const struct sp_packet *p,
						     __u32 service_id, bool from_client)
{
	__u64 now = bpf_ktime_get_boot_ns();
	struct sp_path *path;
	enum sp_reason reason;

	if (flow->ended)
		return flow->ended;
	reason = sp_path_check(cfg, flow->slot, flow->epoch, now, &path);
	if (reason == SP_REASON_PATH_LIVE && flow->service_id != service_id)
		reason = SP_REASON_PATH_STALE;
	if (reason == SP_REASON_PATH_LIVE && path &&
	    !sp_within_budget(path, flow->slot, flow->epoch, p))
		reason = SP_REASON_PATH_SPENT;
	if (reason != SP_REASON_PATH_LIVE || !path) {
		sp_end_flow(key, flow, reason);
		return reason;
	}
	sp_account_flow(flow, path, p, from_client, now);
	return SP_REASON_PATH_LIVE;
}

/*
 * Reserves the OPEN record, then inserts the flow, in this order: no bypass without room for its
 * record. A frame of its own, away from the look-ups: 512 bytes are for all frames together.
 */
static __noinline int sp_insert_flow(const struct sp_flow_key *key, const struct sp_packet *p,
				     struct sp_slot ref, __u32 service_id,
				     __u32 hook_and_ifindex)
{
	__u32 slot = ref.slot;
	struct sp_path *path = bpf_map_lookup_elem(&sp_paths, &slot);
	struct sp_sequence *seq = sp_get_sequence();
	struct sp_scratch *scratch = sp_get_scratch();
	struct sp_flow *flow;
	struct sp_event *e;

	if (!path || !seq || !scratch || !key || !p)
		return SP_REASON_NO_PATH;
	flow = &scratch->flow;
	__builtin_memset(flow, 0, sizeof(*flow));
	flow->slot = ref.slot;
	flow->epoch = ref.epoch;
	flow->service_id = service_id;
	flow->hook = hook_and_ifindex >> 24;
	flow->ifindex = hook_and_ifindex & 0xffffff;
	flow->opened_ns = flow->last_ns = bpf_ktime_get_boot_ns();
	flow->bytes_to_server = p->bytes;
	flow->packets_to_server = p->segments;

	e = bpf_ringbuf_reserve(&sp_must_deliver, sizeof(*e), 0);
	if (!e)
		return SP_REASON_RING_FULL;
	flow->id = ((__u64)bpf_get_smp_processor_id() << 48) | (seq->produced + 1);
	if (bpf_map_update_elem(&sp_flows, key, flow, BPF_NOEXIST)) {
		bpf_ringbuf_discard(e, 0);
		return SP_REASON_FLOWS_FULL;
	}
	__sync_fetch_and_add(&path->flows, 1);
	__sync_fetch_and_add(&path->bytes_to_server, p->bytes);
	__sync_fetch_and_add(&path->packets_to_server, p->segments);
	sp_event_init(e, ++seq->produced, SP_EVENT_OPEN, SP_VERDICT_BYPASSED, SP_REASON_PATH_OPEN);
	sp_event_tuple(e, key);
	sp_event_flow(e, flow);
	sp_submit(e, &seq->must_deliver_woken_ns);
	return SP_REASON_PATH_OPEN;
}

/* A connection more, within the budget, or not at all. */
static __noinline int sp_admit_flow(const struct sp_flow_key *key, const struct sp_packet *p,
				    struct sp_slot ref, __u32 service_id,
				    __u32 hook_and_ifindex)
{
	__u32 slot = ref.slot;
	struct sp_path *path = bpf_map_lookup_elem(&sp_paths, &slot);
	int reason;

	if (!path || !p)
		return SP_REASON_PATH_STALE;
	reason = sp_admit(path, bpf_ktime_get_boot_ns());
	if (reason != SP_REASON_PATH_LIVE)
		return reason;
	if (!sp_within_budget(path, slot, ref.epoch, p))
		return SP_REASON_PATH_SPENT;
	reason = sp_insert_flow(key, p, ref, service_id, hook_and_ifindex);
	if (reason != SP_REASON_PATH_OPEN) {
		sp_unadmit(path);
		sp_unspend(path, slot, p);
	}
	return reason;
}

/* How long a note of who sends a SYN is good for: from a socket to a hook of the same node. */
#define SP_SPEAKER_NS 1000000000ULL

/* The control group that a SYN comes from; 0: nobody knows. It is told once. */
static __noinline __u64 sp_take_speaker(const struct sp_flow_key *key)
{
	struct sp_speaker *speaker;
	__u64 cgroup = 0;

	if (!key)
		return 0;
	speaker = bpf_map_lookup_elem(&sp_speakers, key);
	if (!speaker)
		return 0;
	if (bpf_ktime_get_boot_ns() - speaker->said_ns < SP_SPEAKER_NS)
		cgroup = speaker->cgroup;
	bpf_map_delete_elem(&sp_speakers, key);
	return cgroup;
}

/*
 * The SYN of a new connection: marks what its socket said of it as taken. What another SYN with this tuple said is no longer
 * of use to anybody: this one came from no socket, from one of another machine, or its note was lost.
 */
static __noinline int sp_take_caller(struct __sk_buff *skb, const struct sp_packet *p, const struct sp_flow_key *key)
{
	struct sp_caller *caller;
	__be32 sequence;
	__u64 now;

	if (!p || !key)
		return 0;
	caller = bpf_map_lookup_elem(&sp_callers, key);
	if (!caller)
		return 0;
	now = bpf_ktime_get_boot_ns();
	if (!bpf_skb_load_bytes(skb, p->l4 + offsetof(struct tcphdr, seq), &sequence, sizeof(sequence)) &&
	    bpf_ntohl(sequence) == caller->sequence && now - caller->said_ns < SP_SPEAKER_NS) {
		caller->taken_ns = now;
		return 1;
	}
	bpf_map_delete_elem(&sp_callers, key);
	return 0;
}

/* Negative: there is no entry. Positive: paths serve only some sockets of the address. */
static __always_inline int sp_read_ref(const struct sp_path_key *want, struct sp_slot *ref)
{
	struct sp_path_ref *found = bpf_map_lookup_elem(&sp_path_index, want);

	if (!found)
		return -1;
	ref->slot = *(volatile __u32 *)&found->slot;
	ref->epoch = *(volatile __u32 *)&found->epoch;
	return *(volatile __u32 *)&found->bound != 0;
}

/*
 * Which path may serve a SYN: of its client's port, of the control group that sends it, of its client's address, in this
 * order. Without any slot, whether there are others at that address. *cgroup is the sender, if that was asked.
 */
static __noinline int sp_find_path(const struct sp_flow_key *key, __u32 service_id, struct sp_slot *ref, __u64 *cgroup)
{
	struct sp_path_key want = {};
	int bound;

	if (!key || !ref || !cgroup)
		return SP_REASON_NO_PATH;
	want.client = key->client;
	want.service_id = service_id;
	want.port = key->server_port;
	bound = sp_read_ref(&want, ref);
	if (bound <= 0)
		return bound ? SP_REASON_NO_PATH : SP_REASON_PATH_LIVE;
	want.client_port = key->client_port;
	if (sp_read_ref(&want, ref) >= 0)
		return SP_REASON_PATH_LIVE;
	want.client_port = 0;
	want.cgroup = *cgroup = sp_take_speaker(key);
	if (want.cgroup && sp_read_ref(&want, ref) >= 0)
		return SP_REASON_PATH_LIVE;
	return ref->slot == SP_NO_SLOT ? SP_REASON_PATH_BOUND : SP_REASON_PATH_LIVE;
}

/* Is the path in this slot for this client and its socket? */
static __always_inline bool sp_path_is_for(const struct sp_path *path, const struct sp_flow_key *key,
					   __u32 service_id, __u64 cgroup)
{
	return path->service_id == service_id &&
	       !__builtin_memcmp(&path->client, &key->client, sizeof(path->client)) &&
	       (!path->client_port || path->client_port == key->client_port) &&
	       (!path->cgroup || path->cgroup == cgroup);
}

/*
 * Which path a SYN goes under: PATH_LIVE and its slot, or a reason to go to the proxy. The slot and the epoch
 * come from the index, read once; the slot itself says whether it is live, and whose it is.
 */
static __always_inline enum sp_reason sp_choose_path(const struct sp_flow_key *key, const struct sp_packet *p,
						     __u32 service_id, __u32 hook, struct sp_slot *ref)
{
	__u64 now = bpf_ktime_get_boot_ns(), cgroup = 0;
	struct sp_config *cfg = sp_get_config();
	struct sp_path *path;
	enum sp_reason reason;

	if (!cfg || !key)
		return SP_REASON_NO_PATH;
	reason = sp_find_path(key, service_id, ref, &cgroup);
	if (reason != SP_REASON_PATH_LIVE)
		return reason;
	reason = sp_path_check(cfg, ref->slot, ref->epoch, now, &path);
	if (reason != SP_REASON_PATH_LIVE || !path)
		return reason;
	if (!sp_path_is_for(path, key, service_id, cgroup))
		return SP_REASON_PATH_STALE;
	if (path->ingress && p && path->ingress != sp_ingress_of(p, hook))
		return SP_REASON_PATH_INGRESS;
	if (!sp_lease_holds(now))
		return SP_REASON_LEASE_LAPSED;
	return sp_find_leg(key, SP_LEG_UP, 0) ? SP_REASON_TUPLE_HELD : SP_REASON_PATH_LIVE;
}

/* A SYN: finds its path and opens a flow. Any failure is a reason to go to the proxy. */
static __noinline int sp_open_flow(const struct sp_flow_key *key, const struct sp_packet *p,
				   __u32 service_id, __u32 hook_and_ifindex)
{
	struct sp_slot ref = {};
	enum sp_reason reason = sp_choose_path(key, p, service_id, hook_and_ifindex >> 24, &ref);

	if (reason != SP_REASON_PATH_LIVE)
		return reason;
	return sp_admit_flow(key, p, ref, service_id, hook_and_ifindex);
}

/*
 * A SYN with the tuple of a flow that is over: its final counters go out in a CLOSE and it makes room.
 * Without room for the record it stays, ended for good: the SYN goes to the proxy, and what follows it
 * must go there too.
 */
static __noinline int sp_replace_flow(const struct sp_flow_key *key)
{
	struct sp_flow *flow;

	if (!key)
		return 0;
	flow = bpf_map_lookup_elem(&sp_flows, key);
	if (!flow)
		return 1;
	if (!sp_record_flow(key, flow, SP_EVENT_CLOSE, flow->ended ? : SP_REASON_CLOSED)) {
		__sync_val_compare_and_swap((__u32 *)&flow->ended, SP_REASON_NONE, SP_REASON_CLOSED);
		return 0;
	}
	bpf_map_delete_elem(&sp_flows, key);
	return 1;
}

#endif
