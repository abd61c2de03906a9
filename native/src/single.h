/* One packet's way through a worker, each direction, and its ICMP errors. The engine `simple`
 * takes every packet this way, the batch engines those that need more than a copy. Nothing here
 * blocks, and nothing waits: what the kernel has no room for is dropped. */
#ifndef TUNDP_SINGLE_H
#define TUNDP_SINGLE_H

#include <stdbool.h>

#include "count.h"
#include "hop_sockets.h"

/* A decided packet, its TTL lowered, on its way out as one datagram or as fragments. */
struct outgoing {
	struct destination to;
	const uint8_t *packet;
	uint32_t len;
	uint32_t fragment_mtu; /* above 0: goes in fragments of this size */
	uint64_t bytes_in;     /* what the packet came in with */
	uint64_t packet_id;    /* number of the read that brought it */

	/* How far it is: zero at first. */
	uint64_t bytes_out;
	uint32_t fragment_count;
};

/* Sends a decided packet and counts it, as sent or as dropped. */
void single_forward(struct tundp_worker *worker, const struct tundp_fib *fib,
		    struct outgoing *outgoing);

/* The hop a dropped packet was routed to, 0 if it was not. */
static inline void single_route(const struct tundp_fib *fib, uint32_t hop, struct subject *subject)
{
	subject->hop = hop;
	subject->outer = fib->hops[hop].address;
	subject->port = fib->hops[hop].port;
}

/* Takes one packet read from the TUN, whole and finished, to its verdict and out. */
void single_encapsulate(struct tundp_worker *worker, const struct tundp_fib *fib, uint8_t *packet,
			struct subject *subject);

/* Takes one received datagram to its verdict and out. 0, or -EBADFD when the TUN is gone. */
int single_decapsulate(struct tundp_worker *worker, const struct tundp_fib *fib, uint8_t *datagram,
		       const struct subject *subject);

/* Answers a dropped packet with the verdict's reply, if the ICMP budget allows: to the TUN, or to
 * the peer that holds the packet's source. */
void single_reply_to_tun(struct tundp_worker *worker, const struct tundp_verdict *verdict);
void single_reply_to_peer(struct tundp_worker *worker, const struct tundp_fib *fib,
			  const struct tundp_verdict *verdict, const struct subject *subject);

/* Copies of a delivered packet what shows it to who measures paths, or talks with other nodes, if it
 * is for them. No more than a try: where nobody takes it, it is as if it had been lost. */
void single_hand_over(struct tundp_worker *worker, const uint8_t *packet,
		      const struct tundp_verdict *verdict);

/* Writes to the TUN: 0 or an errno. A vnet header is there if the TUN has them. */
int single_write_tun(struct tundp_worker *worker, const uint8_t *data, size_t len);

#endif
