/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_BUDGET_H
#define SP_BUDGET_H

/*
 * Budgets of a path. Bytes and packets are counted down from leases: each CPU takes a chunk of what is left ahead,
 * under the path's lock, and spends it alone. What is taken is never more than the limit, and a packet
 * passes only if the lease covers all of it, so the overshoot is zero. Chunks shrink near the end; what other CPUs
 * hold when the shared counter is used up is never used: at most SP_LEASE_BYTES (SP_LEASE_PACKETS) for
 * each of them. A path without a limit pays for one comparison.
 */

#include "account.h"

#define SP_LEASE_BYTES 65536
#define SP_LEASE_PACKETS 64

/* Makes a lease cover `need`; the path's lock is held. False: the budget is used up. */
static __always_inline bool sp_draw(__u64 limit, __u64 *taken, __u64 *left, __u64 need, __u64 chunk,
				    __u32 cpus)
{
	__u64 rest = *taken < limit ? limit - *taken : 0;
	__u64 share = rest / (4 * cpus);

	if (!limit || *left >= need)
		return true;
	need -= *left;
	if (rest < need)
		return false;
	if (chunk > share)
		chunk = share;
	if (chunk < need)
		chunk = need;
	*taken += chunk;
	*left += chunk;
	return true;
}

/* Takes the volume of a packet out of this CPU's lease, or out of the shared budget. 0: it is used up. */
static __noinline int sp_spend(struct sp_path *path, __u32 slot, __u32 epoch, __u32 bytes,
			       __u32 packets)
{
	struct sp_budget *lease = bpf_map_lookup_elem(&sp_budget, &slot);
	struct sp_config *cfg = sp_get_config();
	bool covered = true;
	__u32 cpus;

	if (!path || !lease || !cfg)
		return 0;
	cpus = cfg->cpus;
	if (lease->epoch != epoch) {
		lease->epoch = epoch;
		lease->bytes_left = lease->packets_left = 0;
	}
	if ((path->bytes_limit && lease->bytes_left < bytes) ||
	    (path->packets_limit && lease->packets_left < packets)) {
		bpf_spin_lock(&path->lock);
		covered = sp_draw(path->bytes_limit, &path->bytes_taken, &lease->bytes_left, bytes,
				  SP_LEASE_BYTES, cpus) &&
			  sp_draw(path->packets_limit, &path->packets_taken, &lease->packets_left,
				  packets, SP_LEASE_PACKETS, cpus);
		bpf_spin_unlock(&path->lock);
	}
	if (!covered)
		return 0;
	if (path->bytes_limit)
		lease->bytes_left -= bytes;
	if (path->packets_limit)
		lease->packets_left -= packets;
	return 1;
}

/* A packet on a live path: false when its budget is used up. That ends the path, for all of its flows. */
static __always_inline bool sp_within_budget(struct sp_path *path, __u32 slot, __u32 epoch,
					     const struct sp_packet *p)
{
	struct sp_path_status *status;

	if (!path->bytes_limit && !path->packets_limit)
		return true;
	if (sp_spend(path, slot, epoch, p->bytes, p->segments))
		return true;
	status = bpf_map_lookup_elem(&sp_path_state, &slot);
	if (status)
		__sync_val_compare_and_swap((__u32 *)&status->state, SP_PATH_ACTIVE, SP_PATH_SPENT);
	return false;
}

/* One more connection: PATH_LIVE, or why the path takes none now. Those that it has go on. */
static __noinline int sp_admit(struct sp_path *path, __u64 now)
{
	int reason = SP_REASON_PATH_LIVE;

	if (!path)
		return SP_REASON_PATH_STALE;
	if (!path->connections_limit && !path->rate_limit)
		return reason;
	bpf_spin_lock(&path->lock);
	if (now - path->second_ns >= SP_SECOND_NS) {
		path->second_ns = now;
		path->in_second = 0;
	}
	if (path->connections_limit && path->connections_taken >= path->connections_limit)
		reason = SP_REASON_PATH_CONNECTIONS;
	else if (path->rate_limit && path->in_second >= path->rate_limit)
		reason = SP_REASON_PATH_RATE;
	if (reason == SP_REASON_PATH_LIVE) {
		path->connections_taken++;
		path->in_second++;
	}
	bpf_spin_unlock(&path->lock);
	return reason;
}

/* The connection that was admitted did not come about. */
static __always_inline void sp_unadmit(struct sp_path *path)
{
	if (!path->connections_limit && !path->rate_limit)
		return;
	bpf_spin_lock(&path->lock);
	path->connections_taken--;
	if (path->in_second)
		path->in_second--;
	bpf_spin_unlock(&path->lock);
}

/* What this CPU spent a moment ago was not used. */
static __always_inline void sp_unspend(const struct sp_path *path, __u32 slot,
				       const struct sp_packet *p)
{
	struct sp_budget *lease = bpf_map_lookup_elem(&sp_budget, &slot);

	if (lease && path->bytes_limit)
		lease->bytes_left += p->bytes;
	if (lease && path->packets_limit)
		lease->packets_left += p->segments;
}

#endif
