/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_WATCH_H
#define SP_WATCH_H

/*
 * Services that are not enforced. A packet that was found to be none of ours is looked at once more, after its
 * decision: it is counted for its service, and where the service is shadowed, by what Enforce would make of it if its
 * flow began with it. Nothing here drops, steers or changes a packet, opens a flow or takes of a budget, and what
 * is returned says nothing: who asks for a decision cannot find a watched service at all.
 *
 * Not told, because it depends on packets before this one: strays, answers of UDP services, fragments behind the first,
 * ICMP errors. Nor what depends on how full a table is, or on the rate of a budget.
 */

#include "path.h"
#include "hook.h"

#define SP_WATCHED_TO 1		/* the port that a packet goes to */
#define SP_WATCHED_FROM 2	/* the port that it comes from */

/* The SYN or datagram: PATH_OPEN if a path would take it now, else why none. */
static __noinline int sp_would_open(const struct sp_flow_key *key, const struct sp_packet *p, __u32 service_id,
				    __u32 hook)
{
	struct sp_slot ref = {};
	struct sp_path *path;
	enum sp_reason reason;

	if (!key || !p)
		return SP_REASON_NO_PATH;
	reason = sp_choose_path(key, p, service_id, hook, &ref);
	if (reason != SP_REASON_PATH_LIVE)
		return reason;
	path = bpf_map_lookup_elem(&sp_paths, &ref.slot);
	if (path && path->connections_limit && path->connections_taken >= path->connections_limit)
		return SP_REASON_PATH_CONNECTIONS;
	return SP_REASON_PATH_OPEN;
}

/* What Enforce would say of a packet to a port of the service, in the order in which it asks. */
static __always_inline int sp_would_say(struct __sk_buff *skb, const struct sp_packet *p, const struct sp_flow_key *key,
					const struct sp_service *svc, __u32 hook, __u32 behind)
{
	int reason;

	if (sp_lengths_lie(skb, p))
		return SP_REASON_MALFORMED;
	reason = hook == SP_HOOK_IN ? sp_source_lies(skb, p) : SP_REASON_NONE;
	if (reason != SP_REASON_NONE)
		return reason;
	if (p->protocol == IPPROTO_UDP) {
		if (!svc->udp_idle_s)
			return SP_REASON_UDP_DENIED;
		reason = sp_is_instance(svc, p->ifindex) ? sp_would_open(key, p, svc->id, hook) : SP_REASON_NO_PATH;
		return reason == SP_REASON_NO_PATH ? SP_REASON_UDP_NO_PATH : reason;
	}
	if (sp_bad_flags(p))
		return SP_REASON_BAD_FLAGS;
	if (!sp_is_instance(svc, p->ifindex))
		return SP_REASON_NO_PATH;
	return sp_would_open(key, p, svc->id, sp_is_port(behind) ? SP_HOOK_PORT : hook);
}

/* Datagrams have no way through the proxy: what no path takes is refused. */
static __always_inline enum sp_verdict sp_would_be(enum sp_reason reason, __u32 protocol)
{
	if (reason == SP_REASON_NONE)
		return SP_VERDICT_NONE;
	if (reason == SP_REASON_PATH_OPEN)
		return SP_VERDICT_BYPASSED;
	return reason < SP_REASON_PATH_OPEN && protocol == IPPROTO_TCP ? SP_VERDICT_PROXIED : SP_VERDICT_DENIED;
}

/* Writes what was seen to the best-effort ring, at most once a second for client, server and reason. */
__noinline int sp_record_watched(const struct sp_flow_key *key, const struct sp_service *svc, __u32 reason,
				 __u32 ifindex)
{
	struct sp_sequence *seq = sp_get_sequence();
	struct sp_event *e;

	if (!seq || !key || !svc)
		return 0;
	e = sp_begin_summary(&sp_sightings, seq, key, reason, SP_EVENT_WATCHED, sp_would_be(reason, key->protocol));
	if (!e)
		return 0;
	e->ifindex = ifindex;
	e->service_id = svc->id;
	__builtin_memcpy(e->service, svc->name, sizeof(e->service));
	sp_submit(e, &seq->best_effort_woken_ns);
	return 1;
}

static __always_inline void sp_add_seen(struct sp_seen *s, const struct sp_packet *p)
{
	if (sp_syn_only(p))
		s->opens++;
	s->packets += p->segments;
	s->bytes += p->bytes;
}

/* Counts a packet of the service, and tells of it if it would begin a flow or be denied. */
static __always_inline void sp_note_watched(const struct sp_packet *p, const struct sp_flow_key *key,
					    const struct sp_service *svc, enum sp_reason reason)
{
	enum sp_verdict verdict = sp_would_be(reason, p->protocol);
	__u32 id = svc->id;
	struct sp_watched *w = bpf_map_lookup_elem(&sp_watched, &id);

	if (w) {
		sp_add_seen(&w->seen, p);
		if (verdict == SP_VERDICT_PROXIED)
			sp_add_seen(&w->proxied, p);
		else if (verdict == SP_VERDICT_BYPASSED)
			sp_add_seen(&w->bypassed, p);
		else if (verdict == SP_VERDICT_DENIED)
			sp_add_seen(&w->denied, p);
	}
	if (verdict == SP_VERDICT_DENIED || p->protocol == IPPROTO_UDP || sp_syn_only(p))
		sp_record_watched(key, svc, reason, p->ifindex);
}

/* The service at a port of where a packet goes to, if this is the hook that sees it. */
static __noinline struct sp_service *sp_watched_to(struct __sk_buff *skb, const struct sp_packet *p, __u16 port,
						   __u32 hook, __u32 behind)
{
	struct sp_service *svc;

	if (!p)
		return NULL;
	svc = sp_find_row(&p->dst, port, port ? p->protocol : 0, true);
	if (!svc || !sp_sees_towards(hook, behind, svc, p->ifindex))
		return NULL;
	return sp_may_be_foreign(svc, hook) && !sp_is_local(skb, &p->dst, &p->src, p->version) ? NULL : svc;
}

/* Has the pod that a packet goes out to a watched service at this port, at other addresses? */
static __always_inline struct sp_service *sp_watched_behind(const struct sp_packet *p)
{
	struct sp_service_key key = { .port = p->dport, .protocol = p->protocol, .watched = 1, .device = p->leaves_by };
	__u32 zero = 0;
	void *table = p->leaves_by ? bpf_map_lookup_elem(&sp_services, &zero) : NULL;

	return table ? bpf_map_lookup_elem(table, &key) : NULL;
}

static __always_inline enum sp_reason sp_would_be_unlisted(const struct sp_packet *p)
{
	if (p->protocol == IPPROTO_UDP)
		return SP_REASON_UDP_DENIED;
	return sp_syn_only(p) && sp_is_link_scope(&p->dst, p->version) ? SP_REASON_LINK_LOCAL : SP_REASON_UNLISTED;
}

/* A packet to a watched port. False: nobody has it there. */
static __always_inline bool sp_watch_to(struct __sk_buff *skb, const struct sp_packet *p, const struct sp_flow_key *key,
					__u32 hook, __u32 behind)
{
	struct sp_service *svc = sp_watched_to(skb, p, p->dport, hook, behind);
	enum sp_reason reason = SP_REASON_NONE;

	if (svc) {
		if (svc->mode == SP_MODE_SHADOW)
			reason = sp_would_say(skb, p, key, svc, hook, behind);
	} else {
		svc = sp_watched_behind(p);
		if (!svc)
			return false;
		if (svc->mode == SP_MODE_SHADOW)
			reason = sp_would_be_unlisted(p);
	}
	sp_note_watched(p, key, svc, reason);
	return true;
}

/* A SYN from a watched port: Enforce drops it, whoever it is for. */
static __always_inline void sp_watch_from(struct __sk_buff *skb, const struct sp_packet *p,
					  const struct sp_flow_key *key, __u32 hook, __u32 behind)
{
	struct sp_service *svc;

	if (p->protocol != IPPROTO_TCP || !sp_syn_only(p))
		return;
	svc = sp_find_row(&p->src, p->sport, p->protocol, true);
	if (!svc || svc->mode != SP_MODE_SHADOW || !sp_sees_from(hook, behind, svc, p->ifindex))
		return;
	if (sp_may_be_foreign(svc, hook) && !sp_is_local(skb, &p->src, &p->dst, p->version))
		return;
	sp_note_watched(p, key, svc, SP_REASON_REVERSE_OPEN);
}

/* What Enforce would drop because it cannot read it, towards an address that has a shadowed service: the table has a row
 * for port 0 there, of one of them.
 */
static __always_inline void sp_watch_unread(struct __sk_buff *skb, struct sp_packet *p, const struct sp_flow_key *key,
					    __u32 parsed, __u32 hook, __u32 behind)
{
	enum sp_reason reason = parsed == SP_PARSE_FRAGMENT ? SP_REASON_FRAGMENT :
				parsed == SP_PARSE_EXT_HEADERS ? SP_REASON_EXT_HEADERS :
				parsed == SP_PARSE_SOURCE_ROUTE ? SP_REASON_SOURCE_ROUTE :
				parsed == SP_PARSE_MALFORMED ? SP_REASON_MALFORMED : SP_REASON_NONE;
	struct sp_service *svc;

	if (reason == SP_REASON_NONE || !p->version)
		return;
	svc = sp_watched_to(skb, p, 0, hook, behind);
	if (!svc)
		return;
	sp_parse_volume(skb, p);
	sp_note_watched(p, key, svc, reason);
}

/* Looks at a packet that goes on because it is none of ours. `watched` says which of its ports are flagged for that. */
__noinline int sp_watch(struct __sk_buff *skb, __u32 hook, __u32 behind, __u32 parsed, __u32 watched)
{
	struct sp_scratch *scratch = sp_get_scratch();
	struct sp_packet *p;

	if (!scratch)
		return 0;
	p = &scratch->packet;
	scratch->key = sp_key_towards(p);
	if (!sp_ports_read(parsed)) {
		sp_watch_unread(skb, p, &scratch->key, parsed, hook, behind);
		return 0;
	}
	if (!p->segments)
		sp_parse_volume(skb, p);
	if ((watched & SP_WATCHED_TO) && sp_watch_to(skb, p, &scratch->key, hook, behind))
		return 0;
	if (!(watched & SP_WATCHED_FROM))
		return 0;
	scratch->key = sp_key_from(p);
	sp_watch_from(skb, p, &scratch->key, hook, behind);
	return 0;
}

#endif
