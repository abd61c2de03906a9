/* One packet's way through a worker, each direction. Python twin: tundp/engine/reference.py. */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "ip.h"
#include "worker.h"

enum {
	DISCARD_PORT = 9,
	WAITS_MAX = 64,
};

static const uint64_t NS_PER_S = 1000000000u;

/* linux/in.h; absent from some libc headers. */
#ifndef IP_MTU
#define IP_MTU 14
#endif

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

int tundp_may_reply(struct tundp_worker *worker, uint64_t at_ns)
{
	const uint64_t cost_ns = NS_PER_S / TUNDP_ICMP_RATE_PER_S;
	const uint64_t burst_ns = cost_ns * TUNDP_ICMP_BURST;

	if (at_ns > worker->icmp_at_ns) {
		uint64_t passed = at_ns - worker->icmp_at_ns;

		if (worker->icmp_at_ns == 0 || passed > burst_ns - worker->icmp_credit_ns)
			worker->icmp_credit_ns = burst_ns;
		else
			worker->icmp_credit_ns += passed;
	}
	worker->icmp_at_ns = at_ns;
	if (worker->icmp_credit_ns < cost_ns)
		return 0;
	worker->icmp_credit_ns -= cost_ns;
	return 1;
}

static bool may_reply(struct tundp_worker *worker)
{
	if (tundp_may_reply(worker, now_ns()))
		return true;
	worker->counters.icmp_rate_limited++;
	return false;
}

bool worker_wait_writable(struct tundp_worker *worker)
{
	struct pollfd fds[2] = {
		{ .fd = worker->udp_fd, .events = POLLOUT },
		{ .fd = worker->control_fd, .events = POLLIN },
	};

	worker->counters.send_waits++;
	while (!worker_is_stopped(worker)) {
		worker->counters.syscalls++;
		if (poll(fds, 2, -1) < 0 && errno != EINTR)
			return false;
		if (fds[0].revents)
			return true;
		if (fds[1].revents & POLLIN && !worker_is_stopped(worker))
			worker_drain_control(worker); /* A new FIB: taken up with the next burst. */
	}
	return false;
}

/* 0, or the errno of a refusal. EAGAIN only if it may not wait. */
static int send_one(struct tundp_worker *worker, const struct tundp_hop *hop,
		    const uint8_t *packet, size_t len, bool may_wait)
{
	const struct sockaddr_in to = {
		.sin_family = AF_INET,
		.sin_port = htons(hop->port),
		.sin_addr.s_addr = htonl(hop->address),
	};

	for (int waits = 0;; waits++) {
		worker->counters.syscalls++;
		if (sendto(worker->udp_fd, packet, len, MSG_DONTWAIT, (const struct sockaddr *)&to,
			   sizeof(to)) >= 0)
			return 0;
		if (errno == EINTR)
			continue;
		/* Refused so often by a socket with room, it is no lack of room. */
		if (errno != EAGAIN || !may_wait || waits == WAITS_MAX)
			return errno;
		if (!worker_wait_writable(worker))
			return ENOBUFS;
	}
}

/* Sends what a forward verdict says; 0 or the errno of a refusal. */
static int forward(struct tundp_worker *worker, const struct tundp_fib *fib,
		   const struct tundp_verdict *verdict, const uint8_t *packet, bool may_wait,
		   uint64_t *bytes_out)
{
	const struct tundp_hop *hop = &fib->hops[verdict->hop];
	uint64_t count = 0;
	size_t taken = 0, piece, len;
	int error;

	*bytes_out = verdict->len;
	if (!verdict->fragment_mtu)
		return send_one(worker, hop, packet, verdict->len, may_wait);
	*bytes_out = 0;
	while ((piece = tundp_fragment(packet, verdict->fragment_mtu, taken,
				       worker->fragment_buffer, &len))) {
		error = send_one(worker, hop, worker->fragment_buffer, len, may_wait);
		if (error)
			return error;
		taken += piece;
		*bytes_out += len;
		count++;
	}
	worker->counters.fragments_out += count;
	return 0;
}

/* What the kernel knows of the path to a hop becomes the hop's limit. Connecting sends
 * nothing: it looks the route up, learnt exceptions included. Python forgets it again. */
static void learn_path_mtu(struct tundp_worker *worker, const struct tundp_fib *fib, uint32_t hop)
{
	struct sockaddr_in end = { .sin_family = AF_INET };
	int probe = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	socklen_t len = sizeof(int);
	int mtu;

	worker->counters.syscalls += 5;
	if (probe < 0)
		return;
	end.sin_addr.s_addr = htonl(worker->address);
	if (bind(probe, (const struct sockaddr *)&end, sizeof(end)) == 0) {
		end.sin_addr.s_addr = htonl(fib->hops[hop].address);
		end.sin_port = htons(DISCARD_PORT);
		if (connect(probe, (const struct sockaddr *)&end, sizeof(end)) == 0 &&
		    getsockopt(probe, IPPROTO_IP, IP_MTU, &mtu, &len) == 0) {
			mtu -= TUNDP_OVERHEAD;
			if (mtu > TUNDP_MAX_DATAGRAM_LEN)
				mtu = TUNDP_MAX_DATAGRAM_LEN;
			if (mtu < TUNDP_IP_MIN_MTU)
				mtu = TUNDP_IP_MIN_MTU;
			__atomic_store_n(&fib->inner_mtu[hop], (uint16_t)mtu, __ATOMIC_RELAXED);
			worker_notify(worker);
		}
	}
	close(probe);
}

int worker_write_tun(struct tundp_worker *worker, const uint8_t *data, size_t len)
{
	ssize_t written;

	do {
		worker->counters.syscalls++;
		written = write(worker->tun_fd, data, len);
	} while (written < 0 && errno == EINTR);
	return written < 0 ? errno : 0;
}

void worker_reply_to_tun(struct tundp_worker *worker)
{
	const size_t room = worker->offloads & TUNDP_OFFLOAD_VNET_HEADER ? TUNDP_VNET_LEN : 0;
	uint8_t whole[TUNDP_VNET_LEN + TUNDP_REPLY_MAX] = { 0 };

	if (!may_reply(worker))
		return;
	memcpy(whole + room, worker->verdict.reply, worker->verdict.reply_len);
	if (worker_write_tun(worker, whole, room + worker->verdict.reply_len))
		worker->counters.icmp_undeliverable++;
	else
		worker->counters.icmp_to_tun++;
}

void worker_encapsulate(struct tundp_worker *worker, const struct tundp_fib *fib, uint8_t *packet,
			size_t len)
{
	struct tundp_verdict *verdict = &worker->verdict;
	struct tundp_direction *direction = &worker->counters.encap;
	struct tally tally = { .packets = 1, .bytes_in = len };
	uint8_t original[IP_MIN_HEADER_LEN];
	int error = 0;

	memcpy(original, packet, sizeof(original));
	tundp_encapsulate(fib, &worker->rules, packet, len, verdict);
	if (verdict->kind == TUNDP_FORWARD)
		error = forward(worker, fib, verdict, packet, true, &tally.bytes_out);
	if (error == EMSGSIZE) {
		/* This teaches us the path MTU; the packet, put back as it was, then gets the
		 * verdict it should have had. What the second try says, stands. */
		learn_path_mtu(worker, fib, verdict->hop);
		memcpy(packet, original, sizeof(original));
		tundp_encapsulate(fib, &worker->rules, packet, len, verdict);
		error = 0;
		if (verdict->kind == TUNDP_FORWARD)
			error = forward(worker, fib, verdict, packet, true, &tally.bytes_out);
	}
	if (verdict->kind == TUNDP_FORWARD) {
		if (error)
			worker_count_drop(worker, direction, &tally,
					  worker_send_reason(worker, error));
		else
			worker_count_out(worker, direction, &tally);
		return;
	}
	worker_count_drop(worker, direction, &tally, verdict->reason);
	if (verdict->kind == TUNDP_REPLY)
		worker_reply_to_tun(worker);
}

/* An ICMP error about a peer's packet goes to whoever holds the packet's source. It never
 * waits: receiving must not stand still for it. */
void worker_reply_to_peer(struct tundp_worker *worker, const struct tundp_fib *fib)
{
	struct tundp_verdict *verdict = &worker->verdict;
	uint8_t reply[TUNDP_REPLY_MAX];
	uint32_t len = verdict->reply_len;
	uint64_t bytes_out;

	if (!may_reply(worker))
		return;
	memcpy(reply, verdict->reply, len);
	tundp_encapsulate(fib, &worker->rules, reply, len, verdict);
	if (verdict->kind == TUNDP_FORWARD &&
	    forward(worker, fib, verdict, reply, false, &bytes_out) == 0)
		worker->counters.icmp_to_peers++;
	else
		worker->counters.icmp_undeliverable++;
}

int worker_decapsulate(struct tundp_worker *worker, const struct tundp_fib *fib, size_t len,
		       uint32_t outer_source)
{
	struct tundp_verdict *verdict = &worker->verdict;
	struct tundp_direction *direction = &worker->counters.decap;
	struct tally tally = { .packets = 1, .bytes_in = len };
	int error;

	tundp_decapsulate(fib, &worker->rules, worker->udp_buffer, len, outer_source, verdict);
	if (verdict->kind == TUNDP_DELIVER) {
		worker_count_mismatches(worker, verdict);
		tally.bytes_out = verdict->len;
		error = worker_write_tun(worker, worker->udp_buffer, verdict->len);
		if (error)
			worker_count_drop(worker, direction, &tally,
					  worker_tun_reason(worker, error));
		else
			worker_count_out(worker, direction, &tally);
		return error == EBADFD ? -EBADFD : 0;
	}
	worker_count_drop(worker, direction, &tally, verdict->reason);
	if (verdict->kind == TUNDP_REPLY)
		worker_reply_to_peer(worker, fib);
	return 0;
}
