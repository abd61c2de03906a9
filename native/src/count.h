/* Counting. Every function is given the subject, the packet that is counted and what is known of
 * it, and is the one place where that moment can be observed. */
#ifndef TUNDP_COUNT_H
#define TUNDP_COUNT_H

#include <stdbool.h>
#include <sys/socket.h>

#include "tundp_twins.h"

/* What is counted: a packet, or the first of several with one fate. Unknown fields are 0. */
struct subject {
	const uint8_t *packet; /* begins with the IPv4 header, as it is now; may be NULL */
	size_t len;
	uint32_t outer; /* the peer's address: it came from there, or is routed there */
	uint16_t port;  /* the peer's port */
	uint16_t gso_size; /* payload of each packet, if it is a super-packet */
	uint32_t hop;      /* hop it goes to, or came from */
	int error;         /* errno it was refused with */
	/* For events only: number of the read that brought it, and of how many more after that its
	 * packets are. */
	uint64_t packet_id;
	uint32_t more_ids;
	uint32_t wait_ns;  /* in the UDP socket, of a receive; 0 not known */
	uint32_t together; /* packets of its read, send, receive or write; 0: those counted */
	/* Above `len`: packets of that length lie back to back in so many bytes, only the last may
	 * be shorter; `ids`, unless NULL, are the lower halves of their ids. */
	size_t span;
	const uint32_t *ids;
};

/* One change of the counters that a reader sees as a whole. `packets` came in and went out, or
 * were dropped. */
struct tally {
	uint64_t packets;
	uint64_t bytes_in;
	uint64_t bytes_out;
};

/* A TUN read, or a receive, that brought `packets`: a packet, a super-packet, or several back to
 * back. The packet id is set here. */
void count_read(struct tundp_worker *worker, struct tundp_direction *direction, uint64_t packets,
		struct subject *subject);

/* encap: packets the socket took, in one send. */
void count_sent(struct tundp_worker *worker, const struct tally *tally,
		const struct subject *subject);

/* decap: packets the TUN took, in one write. */
void count_delivered(struct tundp_worker *worker, const struct tally *tally,
		     const struct subject *subject);

/* Packets dropped in `direction`, one of the worker's two. */
void count_dropped(struct tundp_worker *worker, struct tundp_direction *direction,
		   const struct tally *tally, uint32_t reason, const struct subject *subject);

/* A refused send, or TUN write, by subject->error: counts the errno, returns the drop reason. */
uint32_t count_send_refusal(struct tundp_worker *worker, const struct subject *subject);
uint32_t count_tun_refusal(struct tundp_worker *worker, const struct subject *subject);

/* A receive from subject->outer: `packets` datagrams of subject->len bytes together. */
void count_heard(struct tundp_worker *worker, uint64_t packets, const struct subject *subject,
		 uint64_t now_ns);

/* What a deliver verdict delivers though the source check minds. */
static inline void count_mismatches(struct tundp_worker *worker,
				    const struct tundp_verdict *verdict,
				    const struct subject *subject)
{
	(void)subject;
	if (!verdict->source_matches)
		worker->counters.source_mismatches++;
	if (!verdict->destination_matches)
		worker->counters.destination_mismatches++;
}

/* A control message of a receive: SO_RXQ_OVFL's is the socket's drops so far, modulo 2^32. */
void count_overflows(struct tundp_worker *worker, const struct cmsghdr *control);

#endif
