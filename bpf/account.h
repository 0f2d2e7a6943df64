/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_ACCOUNT_H
#define SP_ACCOUNT_H

/* The one place that counts and writes records. */

#include "state.h"

#define SP_SECOND_NS 1000000000ULL

static __always_inline void sp_count(enum sp_reason reason, __u64 packets, __u64 bytes)
{
	__u32 index = reason;
	struct sp_counter *c = bpf_map_lookup_elem(&sp_counters, &index);

	if (!c)
		return;
	c->packets += packets;
	c->bytes += bytes;
}

static __always_inline struct sp_sequence *sp_get_sequence(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&sp_sequence, &zero);
}

static __always_inline void sp_event_init(struct sp_event *e, __u64 seq, enum sp_event_kind kind,
					  enum sp_verdict verdict, enum sp_reason reason)
{
	__builtin_memset(e, 0, sizeof(*e));
	e->seq = seq;
	e->boot_ns = bpf_ktime_get_boot_ns();
	e->cpu = bpf_get_smp_processor_id();
	e->kind = kind;
	e->verdict = verdict;
	e->reason = reason;
	e->count = 1;
}

/*
 * A reader is woken once in SP_WAKE_NS by each CPU, for a ring: by the first record at once, and it looks by itself
 * for those that follow closely (pkg/datapath). To wake it costs as much as many records.
 */
#define SP_WAKE_NS 10000000ULL

static __always_inline void sp_submit(struct sp_event *e, __u64 *woken_ns)
{
	__u64 flags = BPF_RB_NO_WAKEUP;

	if (e->boot_ns - *woken_ns >= SP_WAKE_NS) {
		*woken_ns = e->boot_ns;
		flags = 0;
	}
	bpf_ringbuf_submit(e, flags);
}

static __always_inline void sp_event_tuple(struct sp_event *e, const struct sp_flow_key *key)
{
	e->client = key->client;
	e->server = key->server;
	e->client_port = key->client_port;
	e->server_port = key->server_port;
	e->protocol = key->protocol;
}

static __always_inline void sp_event_flow(struct sp_event *e, const struct sp_flow *flow)
{
	struct sp_path *path;
	__u32 slot = flow->slot;

	e->hook = flow->hook;
	e->ifindex = flow->ifindex;
	e->service_id = flow->service_id;
	e->slot = flow->slot;
	e->flow_id = flow->id;
	e->bytes_to_server = flow->bytes_to_server;
	e->bytes_to_client = flow->bytes_to_client;
	e->packets_to_server = flow->packets_to_server;
	e->packets_to_client = flow->packets_to_client;
	path = bpf_map_lookup_elem(&sp_paths, &slot);
	if (!path || path->epoch != flow->epoch)
		return;
	__builtin_memcpy(e->grant, path->grant, sizeof(e->grant));
	__builtin_memcpy(e->service, path->service, sizeof(e->service));
}

/*
 * Writes an END or CLOSE of a bypassed flow to the must-deliver ring. False when there was no room;
 * the record is then counted as lost, but the flow entry keeps what it would have said.
 */
__noinline int sp_record_flow(const struct sp_flow_key *key, const struct sp_flow *flow,
				     __u32 kind, __u32 reason)
{
	struct sp_sequence *seq = sp_get_sequence();
	struct sp_event *e;

	if (!seq || !key || !flow)
		return 0;
	seq->produced++;
	e = bpf_ringbuf_reserve(&sp_must_deliver, sizeof(*e), 0);
	if (!e) {
		seq->must_deliver_lost++;
		return 0;
	}
	sp_event_init(e, seq->produced, kind, SP_VERDICT_BYPASSED, reason);
	sp_event_tuple(e, key);
	sp_event_flow(e, flow);
	sp_submit(e, &seq->must_deliver_woken_ns);
	return 1;
}

/* Adds a packet to its flow and to its path. */
static __always_inline void sp_account_flow(struct sp_flow *flow, struct sp_path *path,
					    const struct sp_packet *p, bool from_client, __u64 now)
{
	sp_touch(&flow->flags, &flow->last_ns, sp_seen(p, from_client), now);
	if (from_client) {
		__sync_fetch_and_add(&flow->bytes_to_server, p->bytes);
		__sync_fetch_and_add(&flow->packets_to_server, p->segments);
		__sync_fetch_and_add(&path->bytes_to_server, p->bytes);
		__sync_fetch_and_add(&path->packets_to_server, p->segments);
		return;
	}
	__sync_fetch_and_add(&flow->bytes_to_client, p->bytes);
	__sync_fetch_and_add(&flow->packets_to_client, p->segments);
	__sync_fetch_and_add(&path->bytes_to_client, p->bytes);
	__sync_fetch_and_add(&path->packets_to_client, p->segments);
}

#define SP_DENIAL_LOST (-1)

/* How many denials the record to write now stands for; 0: one was written within a second;
 * SP_DENIAL_LOST: there is no room to keep count.
 */
static __noinline __s64 sp_denials_due(void *denies, const struct sp_deny_key *key)
{
	struct sp_deny fresh = {}, *d;
	__u64 now = bpf_ktime_get_boot_ns();

	if (!key)
		return 0;
	d = bpf_map_lookup_elem(denies, key);
	if (!d) {
		fresh.reported_ns = now;
		if (!bpf_map_update_elem(denies, key, &fresh, BPF_NOEXIST))
			return 1;
		d = bpf_map_lookup_elem(denies, key); /* another CPU may have been first */
		if (!d)
			return SP_DENIAL_LOST;
	}
	if (now - d->reported_ns < SP_SECOND_NS) {
		__sync_fetch_and_add(&d->pending, 1);
		return 0;
	}
	d->reported_ns = now;
	return 1 + __sync_fetch_and_and(&d->pending, 0);
}

/*
 * Begins a record in the best-effort ring, at most one a second for client, server and reason, which `denies`
 * keeps. NULL: none is due, or it is lost and counted.
 */
static __always_inline struct sp_event *sp_begin_summary(void *denies, struct sp_sequence *seq,
							 const struct sp_flow_key *key, __u32 reason,
							 __u8 kind, __u32 verdict)
{
	struct sp_deny_key deny = { .reason = reason };
	struct sp_event *e = NULL;
	__s64 count;

	deny.client = key->client;
	deny.server = key->server;
	deny.server_port = key->server_port;
	deny.protocol = key->protocol;
	count = sp_denials_due(denies, &deny);
	if (!count)
		return NULL;
	seq->produced++;
	if (count > 0)
		e = bpf_ringbuf_reserve(&sp_best_effort, sizeof(*e), 0);
	if (!e) {
		seq->best_effort_lost++;
		return NULL;
	}
	sp_event_init(e, seq->produced, kind, verdict, reason);
	sp_event_tuple(e, key);
	e->count = count;
	return e;
}

static __always_inline struct sp_event *sp_begin_denial(struct sp_sequence *seq, const struct sp_flow_key *key,
							__u32 reason, __u8 kind)
{
	return sp_begin_summary(&sp_denies, seq, key, reason, kind, SP_VERDICT_DENIED);
}

/* What a device's program denies. */
__noinline int sp_record_deny(const struct sp_flow_key *key, __u32 reason, __u32 ifindex)
{
	struct sp_sequence *seq = sp_get_sequence();
	struct sp_event *e;

	if (!seq || !key)
		return 0;
	e = sp_begin_denial(seq, key, reason, SP_EVENT_DENY);
	if (!e)
		return 0;
	e->ifindex = ifindex;
	sp_submit(e, &seq->best_effort_woken_ns);
	return 1;
}

#endif
