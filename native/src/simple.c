/* The engine `simple`: one packet per system call, as flannel's own proxy, so that the gain of
 * the batched engines can be measured. The packet rules are those of every engine (single.c).
 *
 * After a wakeup both descriptors are read alternately until neither is readable; the control
 * flags are checked every BURST packets, where flannel's proxy starves them. */
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <unistd.h>

#include "clock.h"
#include "fib.h"
#include "latency.h"
#include "publish.h"
#include "single.h"
#include "socket_wait.h"

enum { BURST = 64 };

/* The memory of one worker. */
struct simple {
	uint8_t tun_buffer[TUNDP_BUFFER_LEN];
	uint8_t udp_buffer[TUNDP_BUFFER_LEN];
};

size_t tundp_simple_len(void)
{
	return sizeof(struct simple);
}

/* Returns 1 if a packet was read, 0 if there was none, -EBADFD if the TUN is gone. */
static int from_tun(struct tundp_worker *worker, struct simple *simple, const struct tundp_fib *fib)
{
	struct subject subject = { .packet = simple->tun_buffer };
	const uint64_t before = worker->counters.encap.packets_in;
	uint64_t began_ns;
	ssize_t len;

	if (!(worker->config.directions & TUNDP_ENCAP))
		return 0;
	len = read(worker->config.tun_fd, simple->tun_buffer, sizeof(simple->tun_buffer));
	worker->counters.syscalls++;
	if (len < 0)
		return errno == EBADFD ? -EBADFD : 0;
	began_ns = latency_begin(&worker->encap_batches);
	subject.len = (size_t)len;
	count_read(worker, &worker->counters.encap, 1, &subject);
	single_encapsulate(worker, fib, simple->tun_buffer, &subject);
	latency_end(&worker->counters.encap, before, began_ns);
	return 1;
}

static int from_udp(struct tundp_worker *worker, struct simple *simple, const struct tundp_fib *fib)
{
	struct sockaddr_in from;
	struct iovec buffer = { simple->udp_buffer, sizeof(simple->udp_buffer) };
	union {
		struct cmsghdr align;
		uint8_t bytes[CMSG_SPACE(sizeof(uint32_t)) +
			      CMSG_SPACE(sizeof(struct socket_wait_stamps))];
	} control;
	struct msghdr message = {
		.msg_name = &from,
		.msg_namelen = sizeof(from),
		.msg_iov = &buffer,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control),
	};
	struct subject subject = { .packet = simple->udp_buffer };
	const uint64_t before = worker->counters.decap.packets_in;
	uint64_t began_ns;
	ssize_t len;
	int error;

	if (!(worker->config.directions & TUNDP_DECAP))
		return 0;
	socket_wait_call(worker);
	len = recvmsg(worker->config.udp_fd, &message, MSG_DONTWAIT);
	worker->counters.syscalls++;
	if (len < 0)
		return 0;
	began_ns = latency_begin(&worker->decap_batches);
	socket_wait_returned(worker);
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c)) {
		count_overflows(worker, c);
		subject.wait_ns = socket_wait_of(worker, c, subject.wait_ns);
	}
	subject.len = (size_t)len;
	subject.outer = ntohl(from.sin_addr.s_addr);
	subject.port = ntohs(from.sin_port);
	subject.hop = fib_hop_of_peer(fib, subject.outer);
	count_read(worker, &worker->counters.decap, 1, &subject);
	count_heard(worker, 1, &subject, clock_coarse_ns());
	error = single_decapsulate(worker, fib, simple->udp_buffer, &subject);
	latency_end(&worker->counters.decap, before, began_ns);
	return error ? error : 1;
}

/* Sleeps until there is something to do. -errno when that fails. */
static int wait(struct tundp_worker *worker)
{
	const uint32_t directions = worker->config.directions;
	struct pollfd fds[3] = {
		{ .fd = worker->config.tun_fd, .events = directions & TUNDP_ENCAP ? POLLIN : 0 },
		{ .fd = worker->config.udp_fd, .events = directions & TUNDP_DECAP ? POLLIN : 0 },
		{ .fd = worker->config.control_fd, .events = POLLIN },
	};

	worker->counters.syscalls++;
	worker->counters.wakeups++;
	if (poll(fds, 3, -1) < 0)
		return errno == EINTR ? 0 : -errno;
	if (fds[2].revents)
		publish_drain_control(worker);
	return 0;
}

static int serve(struct tundp_worker *worker, struct simple *simple)
{
	while (!publish_is_stopped(worker)) {
		const struct tundp_fib *fib = publish_next_fib(worker);
		int in_tun = 1, in_udp = 1, error;

		hop_sockets_sweep(worker);
		for (int count = 0; (in_tun || in_udp) && count < BURST; count++) {
			in_tun = from_tun(worker, simple, fib);
			in_udp = from_udp(worker, simple, fib);
			if (in_tun < 0 || in_udp < 0)
				return -EBADFD;
		}
		if (in_tun || in_udp)
			continue;
		error = wait(worker);
		if (error)
			return error;
	}
	return 0;
}

int tundp_simple_run(struct tundp_worker *worker)
{
	struct simple *simple = worker->config.memory;
	int code;

	publish_name_thread(worker);
	hop_sockets_begin(worker);
	code = serve(worker, simple);
	hop_sockets_end(worker);
	return code;
}
