/* The engine `simple`: what flannel's own proxy does, one packet a system call, so that the
 * difference to batched engines can be measured. Its packet rules are everybody's (single.c).
 *
 * After a wakeup both descriptors are read in turn until neither has anything; the control
 * descriptor is looked at every BURST packets, where flannel's starves. */
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "worker.h"

enum { BURST = 64 };

/* 1 one packet taken, 0 none there, -EBADFD the TUN is gone. */
static int from_tun(struct tundp_worker *worker, const struct tundp_fib *fib)
{
	ssize_t len = read(worker->tun_fd, worker->tun_buffer, sizeof(worker->tun_buffer));

	worker->counters.syscalls++;
	if (len < 0)
		return errno == EBADFD ? -EBADFD : 0;
	worker_count_read(&worker->counters.encap, 1);
	worker_encapsulate(worker, fib, worker->tun_buffer, (size_t)len);
	return 1;
}

static int from_udp(struct tundp_worker *worker, const struct tundp_fib *fib)
{
	struct sockaddr_in from;
	struct iovec buffer = { worker->udp_buffer, sizeof(worker->udp_buffer) };
	union {
		struct cmsghdr align;
		uint8_t bytes[CMSG_SPACE(sizeof(uint32_t))];
	} control;
	struct msghdr message = {
		.msg_name = &from,
		.msg_namelen = sizeof(from),
		.msg_iov = &buffer,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control),
	};
	ssize_t len = recvmsg(worker->udp_fd, &message, MSG_DONTWAIT);
	int error;

	worker->counters.syscalls++;
	if (len < 0)
		return 0;
	worker_count_read(&worker->counters.decap, 1);
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c))
		worker_count_overflows(worker, c);
	error = worker_decapsulate(worker, fib, (size_t)len, ntohl(from.sin_addr.s_addr));
	return error ? error : 1;
}

int tundp_simple_run(struct tundp_worker *worker)
{
	struct pollfd fds[3] = {
		{ .fd = worker->tun_fd, .events = POLLIN },
		{ .fd = worker->udp_fd, .events = POLLIN },
		{ .fd = worker->control_fd, .events = POLLIN },
	};

	worker_begin(worker);
	while (!worker_is_stopped(worker)) {
		const struct tundp_fib *fib = worker_fib(worker);
		int in_tun = 1, in_udp = 1;

		for (int count = 0; (in_tun || in_udp) && count < BURST; count++) {
			in_tun = from_tun(worker, fib);
			in_udp = from_udp(worker, fib);
			if (in_tun < 0 || in_udp < 0)
				return -EBADFD;
		}
		if (in_tun || in_udp)
			continue;
		/* Whoever waited for room in the socket may have drained the control
		 * descriptor: the flag is what counts. */
		if (worker_is_stopped(worker))
			break;
		worker->counters.syscalls++;
		worker->counters.wakeups++;
		if (poll(fds, 3, -1) < 0 && errno != EINTR)
			return -errno;
		if (fds[2].revents)
			worker_drain_control(worker);
	}
	return 0;
}
