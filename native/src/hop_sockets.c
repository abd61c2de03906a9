/* Send sockets of single hops. Python twin: tundp/engine/hop_sockets.py.
 *
 * All hops share the worker's UDP socket until that has no room (EAGAIN): then somebody's datagrams
 * wait in the kernel, for ARP or in a queue of a slow path. The hop that met the refusal gets a
 * socket of its own, at once, so that what waits for one peer takes no room from others. Its
 * datagrams look the same on the wire: same source address (IP_PKTINFO), same source port. It is
 * bound to an address of 127.0.0.0/8, so that none from the wire is delivered to it: receiving
 * stays with the shared socket. */
#include "hop_sockets.h"

#include <errno.h>
#include <linux/sockios.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "clock.h"
#include "device_mtu.h"
#include "tundp_twins.h"

enum {
	DESCRIPTORS_LEFT = 64,         /* to the rest of the process, at least */
	LOOPBACK_ADDRESS = 0x7f008285, /* 127.0.130.133: no service's */
	SWEEP_NS = 1000000000,
};

static struct tundp_hop_queue *queue_of(const struct tundp_worker *worker, uint32_t hop)
{
	return &worker->config.hop_queues[hop];
}

static struct tundp_hop_socket *own_of(struct tundp_worker *worker, uint32_t hop)
{
	const uint32_t number = queue_of(worker, hop)->socket;

	return number ? &worker->hop_sockets.sockets[number - 1] : NULL;
}

static void set_count(struct tundp_worker *worker, uint32_t count)
{
	__atomic_store_n(&worker->shared.hop_sockets, count, __ATOMIC_RELAXED);
}

/* Bytes of its datagrams the kernel still holds, as it accounts for them. */
static uint64_t ask_queued(struct tundp_worker *worker, const struct tundp_hop_socket *own)
{
	int queued = 0;

	worker->counters.syscalls++;
	return ioctl(own->fd, SIOCOUTQ, &queued) ? 0 : (uint64_t)queued;
}

/* Closes a hop's own socket; the last one takes its place. */
static void close_socket(struct tundp_worker *worker, struct tundp_hop_socket *own)
{
	const uint32_t count = worker->shared.hop_sockets - 1;
	const struct tundp_hop_socket *last = &worker->hop_sockets.sockets[count];

	worker->counters.syscalls++;
	(void)close(own->fd);
	queue_of(worker, own->hop)->socket = 0;
	if (own != last) {
		*own = *last;
		queue_of(worker, own->hop)->socket =
			(uint32_t)(own - worker->hop_sockets.sockets) + 1;
	}
	set_count(worker, count);
}

void hop_sockets_begin(struct tundp_worker *worker)
{
	struct sockaddr_in bound = { 0 };
	socklen_t len = sizeof(bound);
	struct rlimit limit = { .rlim_cur = RLIM_INFINITY };

	(void)getsockname(worker->config.udp_fd, (struct sockaddr *)&bound, &len);
	(void)getrlimit(RLIMIT_NOFILE, &limit);
	set_count(worker, 0);
	worker->hop_sockets.address = ntohl(bound.sin_addr.s_addr);
	worker->hop_sockets.port = ntohs(bound.sin_port);
	worker->hop_sockets.looked_ns = 0;
	worker->hop_sockets.swept_ns = 0;
	worker->hop_sockets.fd_max =
		limit.rlim_cur > INT32_MAX ? INT32_MAX :
		limit.rlim_cur > DESCRIPTORS_LEFT ? (uint32_t)limit.rlim_cur - DESCRIPTORS_LEFT :
						    0;
}

void hop_sockets_end(struct tundp_worker *worker)
{
	while (worker->shared.hop_sockets)
		close_socket(worker, &worker->hop_sockets.sockets[0]);
}

int hop_sockets_find_own(struct tundp_worker *worker, const struct destination *to)
{
	const uint64_t now_ns = clock_coarse_ns();
	struct tundp_hop_socket *own = own_of(worker, to->hop);
	uint64_t queued;

	if (!own)
		return queue_of(worker, to->hop)->closed_until > now_ns ? -1 :
									  worker->config.udp_fd;
	queued = ask_queued(worker, own);
	if (memcmp(&own->way, &to->way, sizeof(own->way)) ||
	    tundp_slot_may_return(&own->slot, queued, now_ns)) {
		close_socket(worker, own);
		return worker->config.udp_fd;
	}
	tundp_slot_look(&own->slot, queued, now_ns);
	return own->fd;
}

void hop_sockets_used(struct tundp_worker *worker, const struct destination *to, bool is_taken)
{
	struct tundp_hop_socket *own = own_of(worker, to->hop);

	if (own)
		tundp_slot_use(&own->slot, clock_coarse_ns(), is_taken);
}

/* A socket that sends as the shared one does and receives nothing, or -1. */
static int open_socket(struct tundp_worker *worker)
{
	const struct sockaddr_in address = {
		.sin_family = AF_INET,
		.sin_port = htons(worker->hop_sockets.port),
		.sin_addr.s_addr = htonl(LOOPBACK_ADDRESS),
	};
	const int on = 1, discovery = IP_PMTUDISC_INTERFACE, len = TUNDP_HOP_SEND_BUFFER_LEN, least = 1;
	const int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	worker->counters.syscalls += 7;
	if (fd < 0)
		return -1;
	/* FREEBIND: lo may be down. REUSEADDR: other workers and daemons have such sockets, too. */
	if ((uint32_t)fd > worker->hop_sockets.fd_max ||
	    setsockopt(fd, IPPROTO_IP, IP_FREEBIND, &on, sizeof(on)) ||
	    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) ||
	    setsockopt(fd, IPPROTO_IP, IP_MTU_DISCOVER, &discovery, sizeof(discovery)) ||
	    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &len, sizeof(len)) ||
	    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &least, sizeof(least)) ||
	    bind(fd, (const struct sockaddr *)&address, sizeof(address))) {
		(void)close(fd);
		return -1;
	}
	return fd;
}

/* Takes a socket from another hop, if one can do without: its place, or NULL. */
static struct tundp_hop_socket *take_socket(struct tundp_worker *worker, uint64_t now_ns)
{
	struct tundp_hop_sockets *all = &worker->hop_sockets;
	struct tundp_hop_socket *own;
	int picked;

	for (uint32_t i = 0; i < worker->shared.hop_sockets; i++)
		tundp_slot_look(&all->sockets[i].slot, ask_queued(worker, &all->sockets[i]),
				now_ns);
	picked = tundp_slot_pick(all->sockets, worker->shared.hop_sockets, now_ns);
	if (picked < 0)
		return NULL;
	own = &all->sockets[picked & ~TUNDP_SLOT_STUCK];
	queue_of(worker, own->hop)->socket = 0;
	if (picked & TUNDP_SLOT_STUCK) {
		/* What waits in it stays with the kernel, so its hop needs no other just now. */
		queue_of(worker, own->hop)->closed_until = now_ns + TUNDP_HOP_CLOSED_NS;
		(void)close(own->fd);
		own->fd = open_socket(worker);
		if (own->fd < 0) {
			own->fd = -1;
			close_socket(worker, own);
			return NULL;
		}
	}
	return own;
}

int hop_sockets_open(struct tundp_worker *worker, const struct destination *to)
{
	struct tundp_hop_sockets *all = &worker->hop_sockets;
	const uint64_t now_ns = clock_coarse_ns();
	const uint32_t count = worker->shared.hop_sockets;
	struct tundp_hop_socket *own = NULL;

	if (count < TUNDP_HOP_SOCKETS_MAX) {
		const int fd = open_socket(worker);

		if (fd >= 0) {
			own = &all->sockets[count];
			own->fd = fd;
			set_count(worker, count + 1);
		}
	}
	if (!own && now_ns - all->looked_ns >= TUNDP_HOP_LOOK_NS) {
		own = take_socket(worker, now_ns);
		/* Only a look counts: those who ask in between must not put off the next one. */
		if (!own)
			all->looked_ns = now_ns;
	}
	if (!own)
		return -1;
	own->slot = (struct tundp_hop_slot){ .since_ns = now_ns,
					     .used_ns = now_ns,
					     .drained_ns = now_ns };
	own->way = to->way;
	own->hop = to->hop;
	queue_of(worker, to->hop)->socket = (uint32_t)(own - all->sockets) + 1;
	worker->counters.hop_sockets_opened++;
	return own->fd;
}

void hop_sockets_sweep(struct tundp_worker *worker)
{
	struct tundp_hop_sockets *all = &worker->hop_sockets;
	uint64_t now_ns;
	uint32_t at = 0;

	if (!worker->shared.hop_sockets)
		return;
	now_ns = clock_coarse_ns();
	if (now_ns - all->swept_ns < SWEEP_NS)
		return;
	all->swept_ns = now_ns;
	while (at < worker->shared.hop_sockets) {
		struct tundp_hop_socket *own = &all->sockets[at];

		if (now_ns - own->slot.since_ns >= TUNDP_HOP_HOLD_NS &&
		    tundp_slot_may_return(&own->slot, ask_queued(worker, own), now_ns))
			close_socket(worker, own);
		else
			at++;
	}
}

void hop_sockets_source(const struct tundp_worker *worker, union send_control *control)
{
	const struct in_pktinfo source = {
		.ipi_spec_dst.s_addr = htonl(worker->hop_sockets.address),
	};
	struct cmsghdr *message = &control->align;

	message->cmsg_level = IPPROTO_IP;
	message->cmsg_type = IP_PKTINFO;
	message->cmsg_len = CMSG_LEN(sizeof(source));
	memcpy(CMSG_DATA(message), &source, sizeof(source));
}
