/* What every engine's loop shares: counting, publication, single packets with their decisions. */
#ifndef TUNDP_WORKER_H
#define TUNDP_WORKER_H

#include <stdbool.h>
#include <sys/socket.h>

#include "tundp.h"

/* The FIB to use until the next call; remembers its generation as seen. Once a turn. */
const struct tundp_fib *worker_fib(struct tundp_worker *worker);

/* Gives the calling thread the worker's name. */
void worker_begin(const struct tundp_worker *worker);

bool worker_is_stopped(const struct tundp_worker *worker);

/* Takes one packet that was read from the TUN, whole and finished, to its verdict and out. */
void worker_encapsulate(struct tundp_worker *worker, const struct tundp_fib *fib, uint8_t *packet,
			size_t len);

/* Takes one received datagram to its verdict and out. 0, or -EBADFD when the TUN is gone. */
int worker_decapsulate(struct tundp_worker *worker, const struct tundp_fib *fib, size_t len,
		       uint32_t outer_source);

/* Counts what a deliver verdict delivers though the source check minds. */
static inline void worker_count_mismatches(struct tundp_worker *worker,
					   const struct tundp_verdict *verdict)
{
	if (!verdict->source_matches)
		worker->counters.source_mismatches++;
	if (!verdict->destination_matches)
		worker->counters.destination_mismatches++;
}

/* Answers a dropped packet with the verdict's reply: to the TUN, or to the peer that holds
 * the packet's source. */
void worker_reply_to_tun(struct tundp_worker *worker);
void worker_reply_to_peer(struct tundp_worker *worker, const struct tundp_fib *fib);

/* Waits until the socket takes a datagram again: false when the worker is to stop. Nothing
 * is read meanwhile, from the TUN or the socket: the queues build up in the kernel. */
bool worker_wait_writable(struct tundp_worker *worker);

/* Writes to the TUN: 0 or an errno. A vnet header is there if the TUN has them. */
int worker_write_tun(struct tundp_worker *worker, const uint8_t *data, size_t len);

/* One change of the counters that a reader sees as a whole. `packets` came in and went out,
 * or were dropped. */
struct tally {
	uint64_t packets;
	uint64_t bytes_in;
	uint64_t bytes_out;
};
void worker_count_out(struct tundp_worker *worker, struct tundp_direction *direction,
		      const struct tally *tally);
void worker_count_drop(struct tundp_worker *worker, struct tundp_direction *direction,
		       const struct tally *tally, uint32_t reason);
void worker_count_read(struct tundp_direction *direction, uint64_t packets);

/* An errno to the drop reason of a send or of a TUN write; counts the errno. */
uint32_t worker_send_reason(struct tundp_worker *worker, int error);
uint32_t worker_tun_reason(struct tundp_worker *worker, int error);

/* SO_RXQ_OVFL's control message is the socket's drops so far, modulo 2^32. */
void worker_count_overflows(struct tundp_worker *worker, const struct cmsghdr *control);

/* Tells Python that there is something to learn. */
void worker_notify(struct tundp_worker *worker);

void worker_drain_control(struct tundp_worker *worker);

#endif
