/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#ifndef SP_REASON_H
#define SP_REASON_H

/*
 * What happened to a flow. Append only; a number is never used again.
 * pkg/flow is generated from the BTF of these two enums (make generate).
 */
enum sp_verdict {
	SP_VERDICT_NONE = 0,
	SP_VERDICT_PROXIED = 1,
	SP_VERDICT_BYPASSED = 2,
	SP_VERDICT_DENIED = 3,
};

/*
 * Why. Append only; a number is never used again. Numbers below 100 are given
 * by the programs, numbers from 100 in user space.
 */
enum sp_reason {
	SP_REASON_NONE = 0,

	/* the packet went to the proxy */
	SP_REASON_NO_PATH = 1,		/* SYN without a path */
	SP_REASON_LEG = 2,		/* later packet of a proxied flow */
	SP_REASON_STRAY = 3,		/* no SYN, no state: the proxy's listener resets it */
	SP_REASON_PATH_EXPIRED = 4,	/* path is past its deadline */
	SP_REASON_PATH_REVOKED = 5,
	SP_REASON_PATH_SPENT = 6,	/* a budget is used up */
	SP_REASON_PATH_STALE = 7,	/* the slot serves another path now */
	SP_REASON_LEASE_LAPSED = 8,	/* no agent: nothing new is admitted */
	SP_REASON_RING_FULL = 9,	/* no room for the OPEN record */
	SP_REASON_FLOWS_FULL = 10,
	SP_REASON_TUPLE_HELD = 11,	/* the proxy holds this tuple towards the service */
	SP_REASON_PATH_RATE = 12,	/* the path took its connections of this second */
	SP_REASON_PATH_INGRESS = 13,	/* the path is for clients behind another kind of device */
	SP_REASON_PATH_CONNECTIONS = 14,	/* the path took all of its connections */
	SP_REASON_PATH_BOUND = 15,	/* paths of the client's address are bound to other sockets of it */

	/* the packet went straight on, under a live path */
	SP_REASON_PATH_OPEN = 20,	/* SYN that opened a bypassed flow */
	SP_REASON_PATH_LIVE = 21,	/* later packet of a bypassed flow */

	/* a socket was given the packet: the backstop knows why it came */
	SP_REASON_SOCKET_LEG = 25,	/* the proxy sent it */
	SP_REASON_SOCKET_PATH = 26,	/* under a live path */
	SP_REASON_POD_LOOPBACK = 27,	/* from the pod to its own service */
	SP_REASON_SOCKET_RESET = 28,	/* a RST of a flow whose path ended, or that answers a stray */

	/* the packet came from the proxy and was put where it belongs */
	SP_REASON_PX_DOWN = 30,		/* towards the client */
	SP_REASON_PX_UP = 31,		/* towards the service */
	SP_REASON_PX_RESET = 32,	/* RST that answers a stray */
	SP_REASON_PX_ACCEPT = 33,	/* handed to a socket of the proxy */
	SP_REASON_REINJECTED = 34,	/* second pass of one of ours */

	/* an ICMP error, by the packet that it quotes */
	SP_REASON_ICMP_LEG = 35,	/* about a packet of the proxy: to the proxy */
	SP_REASON_ICMP_LIVE = 36,	/* about a packet of a bypassed flow: passed */

	/* the packet ended a flow whose path is over */
	SP_REASON_PATH_RESET = 40,	/* it went on as the RST that ends the other half */

	/* the packet was dropped */
	SP_REASON_MALFORMED = 50,	/* headers lie or are cut off */
	SP_REASON_FRAGMENT = 51,	/* TCP fragment towards a protected address */
	SP_REASON_EXT_HEADERS = 52,	/* IPv6 extension headers beyond the bound or unknown */
	SP_REASON_NO_LISTENER = 53,	/* the proxy is not there */
	SP_REASON_LEGS_FULL = 54,
	SP_REASON_NO_LEG = 55,		/* our mark, but no leg or stray that explains it */
	SP_REASON_PX_UNEXPECTED = 56,	/* from the proxy, but not of a flow it may serve */
	SP_REASON_PX_NO_ORIGIN = 57,	/* proxy dials for a client that did not ask */
	SP_REASON_PX_TUPLE_HELD = 58,	/* proxy dials with the tuple of a bypassed flow */
	SP_REASON_NO_STAMP = 59,	/* on px1, but not sent there by our programs */
	SP_REASON_REVERSE_OPEN = 60,	/* SYN that leaves from a protected port */
	SP_REASON_NO_CONFIG = 61,	/* configuration map is empty */
	SP_REASON_UDP_NO_PATH = 62,	/* datagram to a UDP service without a path */
	SP_REASON_UDP_NO_FLOW = 63,	/* datagram of a UDP service that answers no flow */
	SP_REASON_UDP_IDLE = 64,	/* datagram of a UDP service whose flow was silent for too long; also the end of that flow */
	SP_REASON_UDP_DENIED = 65,	/* datagram to a port that is protected for TCP */
	SP_REASON_ICMP_STRAY = 66,	/* ICMP error or redirect about a protected port, but of no live flow */
	SP_REASON_ORPHAN = 67,		/* fragment whose first one did not pass here */
	SP_REASON_SOURCE_ROUTE = 68,	/* its sender chose its way */
	SP_REASON_BAD_FLAGS = 69,	/* TCP flags that no connection has */
	SP_REASON_SOURCE_FOREIGN = 70,	/* from a pod, with an address that is not its own */
	SP_REASON_SOURCE_OWN = 71,	/* from an uplink, with an address of the node or of its pods */
	SP_REASON_LINK_LOCAL = 72,	/* SYN to a pod, at an address that its link gave it and no policy lists */
	SP_REASON_UNLISTED = 73,	/* TCP to a port of a pod's service, at another address of the pod */

	/* the packet was dropped before a socket, by the backstop */
	SP_REASON_BACKSTOP = 75,	/* no leg and no live path explains it: it came around the hooks */
	SP_REASON_SOCKET_ENDED = 76,	/* was on its way when its path ended */
	SP_REASON_LOOPBACK_DENIED = 77,	/* from the pod to its own service, which is denied */
	SP_REASON_UNDECIDED = 78,	/* to a port that some pods have protected, in a pod that the agent does not know yet */

	/* the packet was dropped by XDP, at the uplink */
	SP_REASON_XDP_MALFORMED = 80,	/* headers lie or are cut off */
	SP_REASON_XDP_MAPPED = 81,	/* IPv4-mapped IPv6 address on the wire */
	SP_REASON_XDP_MARTIAN = 82,	/* loopback on the wire; source is a group, all or none */
	SP_REASON_XDP_LAND = 83,	/* source is the destination */
	SP_REASON_XDP_OWN_SOURCE = 84,	/* source is an address of this node or of its pods */
	SP_REASON_XDP_DENIED = 85,	/* source is on the deny list */
	SP_REASON_XDP_SYN_SOURCE = 86,	/* source sends too many SYNs */
	SP_REASON_XDP_SYN_SERVICE = 87,	/* service gets too many SYNs */

	/* given by the proxy */
	SP_REASON_IDENTITY = 100,	/* served: identity proven and authorised */
	SP_REASON_NO_TLS = 101,		/* first byte is no TLS record */
	SP_REASON_HANDSHAKE_FAILED = 102,
	SP_REASON_HANDSHAKE_TIMEOUT = 103,
	SP_REASON_NOT_AUTHORISED = 104,	/* identity proven, no access rule matches */
	SP_REASON_NO_OWN_IDENTITY = 105,	/* proxy has no identity of its own */
	SP_REASON_UNKNOWN_SERVICE = 106,
	SP_REASON_UPSTREAM_FAILED = 107,
	SP_REASON_IDLE_TIMEOUT = 108,
	SP_REASON_LIMIT = 109,		/* connection limit reached */
	SP_REASON_DRAINED = 110,	/* proxy stopped */
	SP_REASON_CLOSED = 111,		/* both ends closed in order */
	SP_REASON_POLICY_CHANGED = 112,	/* policy no longer allows it */
	SP_REASON_IDENTITY_EXPIRED = 113,	/* what proved the identity has expired since */
	SP_REASON_TOKEN_REFUSED = 114,	/* a token or session that proves nobody */
	SP_REASON_SESSION_ENDED = 115,	/* the token or login behind it ended since */
	SP_REASON_LOGIN_NEEDED = 116,	/* a request that shows no identity */
	SP_REASON_BAD_REQUEST = 117,	/* a request that could be read in two ways, or in none */
	SP_REASON_REQUEST_LIMIT = 118,	/* requests too slow, too large or too many */
	/* 119 stays unused: it was for callers whose workload nothing proves, and nothing gave it */
	SP_REASON_LOOP = 120,		/* it came back to where it was */
	SP_REASON_ORIGINATED = 121,	/* sent on to a remote service, as the workload that asked */
	SP_REASON_UNATTESTED = 122,	/* nothing proves the workload that asks for a remote service */
	SP_REASON_PEER_REFUSED = 123,	/* who answered for a remote service is not who it has to be */
	SP_REASON_IN_CLEAR = 124,	/* sent on to a remote service that speaks no TLS, in the clear, as policy says */

	/* given by the agent, in the place of the program's PATH_OPEN */
	SP_REASON_PROBE = 125,		/* SYN that opened a flow under the path of a service's listed probes */
};

/* Which edge of a flow a record tells of. Append only. */
enum sp_event_kind {
	SP_EVENT_NONE = 0,
	SP_EVENT_OPEN = 1,	/* a flow began */
	SP_EVENT_CLOSE = 2,	/* a flow ended, with its final counters */
	SP_EVENT_END = 3,	/* its path ended while the flow was alive */
	SP_EVENT_DENY = 4,	/* refused; count says how often since the last record */
	SP_EVENT_UPDATE = 5,	/* a flow goes on; counters so far */
	SP_EVENT_WATCHED = 6,	/* seen, and nothing done: the service is not enforced. The verdict is what Enforce would have said, NONE where nobody asks */
	SP_EVENT_BACKSTOP = 8,	/* traffic came around the hooks; count says how much of it */
	SP_EVENT_REQUEST = 9,	/* one request of a proxied flow was answered, or refused */
};

#endif
