/* One packet's way through a worker, each direction, and its ICMP errors. The engine `simple`
 * takes every packet this way, the batch engines those that need more than a copy. Nothing here
 * blocks: the caller waits for a full socket. */
#ifndef TUNDP_SINGLE_H
#define TUNDP_SINGLE_H

#include <stdbool.h>

#include "count.h"

enum { SEND_REFUSALS_MAX = 64 }; /* EAGAINs in a row from a socket that polls as writable */

/* Where datagrams go: an endpoint, and the hop id that meant it when they were decided. */
struct destination {
	struct tundp_hop endpoint;
	uint32_t hop;
};

/* A decided packet, its TTL lowered, on its way out as one datagram or as fragments. Borrows the
 * packet until single_forward is done with it. */
struct outgoing {
	struct destination to;
	const uint8_t *packet;
	uint32_t len;
	uint32_t fragment_mtu; /* above 0: goes in fragments of this size */
	uint64_t bytes_in;     /* what the packet came in with */

	/* How far it is: zero at first. */
	size_t taken; /* payload bytes that left in fragments */
	uint64_t bytes_out;
	uint32_t fragment_count;
	uint32_t refusals; /* EAGAINs in a row */
	bool is_narrowed;  /* refused with EMSGSIZE once, and decided again */
};

/* Sends a decided packet and counts it. True when it is done with, sent or dropped; false when
 * the socket is full: call again with the same `outgoing` once there is room. */
bool single_forward(struct tundp_worker *worker, const struct tundp_fib *fib,
		    struct outgoing *outgoing);

/* Counts a packet that still waits as dropped: the worker ends. */
void single_abandon(struct tundp_worker *worker, const struct outgoing *outgoing);

/* Takes one packet read from the TUN, whole and finished, to its verdict and out. Returns as
 * single_forward, with `outgoing` filled in. */
bool single_encapsulate(struct tundp_worker *worker, const struct tundp_fib *fib, uint8_t *packet,
			size_t len, struct outgoing *outgoing);

/* Takes one received datagram to its verdict and out. 0, or -EBADFD when the TUN is gone. */
int single_decapsulate(struct tundp_worker *worker, const struct tundp_fib *fib, uint8_t *datagram,
		       const struct subject *subject);

/* Answers a dropped packet with the verdict's reply, if the ICMP budget allows: to the TUN, or to
 * the peer that holds the packet's source. */
void single_reply_to_tun(struct tundp_worker *worker, const struct tundp_verdict *verdict);
void single_reply_to_peer(struct tundp_worker *worker, const struct tundp_fib *fib,
			  const struct tundp_verdict *verdict);

/* Writes to the TUN: 0 or an errno. A vnet header is there if the TUN has them. */
int single_write_tun(struct tundp_worker *worker, const uint8_t *data, size_t len);

#endif
