/* Send sockets of single hops, for those who found the shared one full. */
#ifndef TUNDP_HOP_SOCKETS_H
#define TUNDP_HOP_SOCKETS_H

#include <netinet/in.h>
#include <stdbool.h>
#include <sys/socket.h>

#include "tundp.h"

/* Where datagrams go: an endpoint, the address and port they are sent to, which are the endpoint's
 * unless the hop is diverted, and the hop id that meant it when they were decided. */
struct destination {
	struct tundp_hop endpoint;
	struct tundp_hop way;
	uint32_t hop;
};

/* Where datagrams for a hop go. */
static inline struct destination hop_destination(const struct tundp_fib *fib, uint32_t hop)
{
	return (struct destination){ .endpoint = fib->hops[hop],
				     .way = fib->ways[hop],
				     .hop = hop };
}

/* Control messages of one send: which address it is from, and how long each datagram is. What is
 * not wanted is left out at either end. Aligned as they must be. */
union send_control {
	struct cmsghdr align;
	struct {
		uint8_t source[CMSG_SPACE(sizeof(struct in_pktinfo))];
		uint8_t segment[CMSG_SPACE(sizeof(uint16_t))];
	} part;
};

/* The worker begins to run: it has no such socket; and ends: those there are get closed. What
 * was sent by them leaves all the same. */
void hop_sockets_begin(struct tundp_worker *worker);
void hop_sockets_end(struct tundp_worker *worker);

/* What hop_sockets_find does when there are any. */
int hop_sockets_find_own(struct tundp_worker *worker, const struct destination *to);

/* The descriptor to send to `to` by: the shared one's, or the hop's own; -1 if the hop is closed,
 * which counts as a full queue (EAGAIN). */
static inline int hop_sockets_find(struct tundp_worker *worker, const struct destination *to)
{
	if (!worker->shared.hop_sockets)
		return worker->config.udp_fd;
	return hop_sockets_find_own(worker, to);
}

/* The shared socket had no room for a datagram to `to`: a socket of the hop's own to send the
 * same one by, or -1 if there is none, which counts as a full queue (EAGAIN). */
int hop_sockets_open(struct tundp_worker *worker, const struct destination *to);

/* A send by the hop's own socket, which was found for it before, came to an end. */
void hop_sockets_used(struct tundp_worker *worker, const struct destination *to, bool is_taken);

/* Returns sockets whose hops no longer need them, now and then. Call once per loop iteration. */
void hop_sockets_sweep(struct tundp_worker *worker);

/* Writes the control message without which a hop's own socket would send from where it is bound. */
void hop_sockets_source(const struct tundp_worker *worker, union send_control *control);

#endif
