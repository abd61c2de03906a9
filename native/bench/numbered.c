/* Numbered datagrams at an exact rate, and what became of each: see traffic.h. */
#include <arpa/inet.h>

#include "loop.h"

enum { CATCH_UP = 4 };

/* Where a sender stands. */
struct schedule {
	uint64_t started_ns;
	uint64_t number; /* the next to send */
	uint32_t rate;
	uint32_t burst; /* the most in one go */
};

/* How many are due by now, the most one go may have; how late the first of them is. */
static uint32_t due(const struct schedule *schedule, struct traffic *traffic)
{
	uint64_t passed = clock_ns(CLOCK_MONOTONIC) - schedule->started_ns;
	uint64_t count = passed * schedule->rate / NS_PER_S + 1;
	uint64_t first_ns = schedule->number * NS_PER_S / schedule->rate;

	if (count <= schedule->number)
		return 0;
	if (passed - first_ns > traffic->late_ns)
		set(&traffic->late_ns, passed - first_ns);
	count -= schedule->number;
	return count < schedule->burst ? (uint32_t)count : schedule->burst;
}

/* Whether the packet is as good as lost: what the kernel says of a route or a neighbour. */
static int is_refusal(int error)
{
	return error == ENETUNREACH || error == EHOSTUNREACH || error == ENETDOWN ||
	       error == ECONNREFUSED || error == EPERM || error == EACCES;
}

/* Sends one batch from `messages`; how many numbers are used up, or -1 after an error. */
static int send_batch(int fd, struct mmsghdr *messages, uint32_t count, uint64_t *sent_ns,
		      uint32_t size, struct traffic *traffic)
{
	uint64_t now = clock_ns(CLOCK_MONOTONIC);
	int sent = sendmmsg(fd, messages, count, 0);

	if (sent < 0 && (is_passing(errno) || errno == ENOBUFS))
		return 0;
	if (sent < 0 && is_refusal(errno)) {
		*sent_ns = now;
		add(&traffic->refused, 1);
		return 1;
	}
	if (sent < 0) {
		traffic->error = errno;
		return -1;
	}
	for (int i = 0; i < sent; i++)
		sent_ns[i] = now;
	add(&traffic->messages, (uint64_t)sent);
	add(&traffic->bytes, (uint64_t)sent * size);
	return sent;
}

void traffic_numbered_send(int fd, const uint8_t *pattern, uint32_t size, uint32_t rate,
			   uint64_t run, uint32_t address, uint16_t port, uint64_t *sent_ns,
			   uint64_t capacity, struct traffic *traffic)
{
	struct sockaddr_in to = { .sin_family = AF_INET,
				  .sin_port = htons(port),
				  .sin_addr.s_addr = htonl(address) };
	struct datagram datagrams[BATCH];
	struct mmsghdr messages[BATCH];
	uint64_t tick_ns = rate < NS_PER_S / NS_PER_MS ? NS_PER_S / rate : NS_PER_MS;
	uint64_t next_ns = clock_ns(CLOCK_MONOTONIC);
	struct schedule schedule = { .started_ns = next_ns,
				     .rate = rate,
				     .burst = CATCH_UP * (uint32_t)(rate * tick_ns / NS_PER_S + 1) };

	memset(messages, 0, sizeof(messages));
	for (unsigned int i = 0; i < BATCH; i++) {
		messages[i].msg_hdr.msg_name = &to;
		messages[i].msg_hdr.msg_namelen = sizeof(to);
	}
	while (!is_stopped(traffic)) {
		uint32_t left = due(&schedule, traffic);
		int used = 1;

		if (schedule.number + left > capacity) {
			traffic->error = ENOSPC;
			return;
		}
		for (; left && used > 0; left -= (uint32_t)used, schedule.number += (uint64_t)used) {
			uint32_t count = left < BATCH ? left : BATCH;

			for (uint32_t i = 0; i < count; i++)
				number_datagram(&datagrams[i], &messages[i].msg_hdr, pattern, size,
						schedule.number + i, run);
			used = send_batch(fd, messages, count, sent_ns + schedule.number, size,
					  traffic);
			if (used < 0)
				return;
		}
		next_ns += tick_ns;
		if (next_ns < clock_ns(CLOCK_MONOTONIC))
			next_ns = clock_ns(CLOCK_MONOTONIC) + tick_ns;
		sleep_until(next_ns);
	}
}

void traffic_numbered_receive(int fd, const uint8_t *pattern, uint32_t size, uint64_t run,
			      uint64_t *numbers, uint64_t *received_ns, uint64_t capacity,
			      struct traffic *traffic)
{
	static _Thread_local struct inbox inbox;

	open_inbox(&inbox);
	while (!is_stopped(traffic)) {
		int got = receive_datagrams(fd, &inbox, traffic);
		uint64_t now = clock_ns(CLOCK_MONOTONIC);

		if (got < 0)
			return;
		for (int i = 0; i < got; i++) {
			size_t len = inbox.messages[i].msg_len;
			uint64_t number;

			if (!read_number(inbox.buffers[i], len, pattern, size, run, &number, traffic))
				continue;
			if (traffic->samples == capacity) {
				traffic->error = ENOSPC;
				return;
			}
			numbers[traffic->samples] = number;
			received_ns[traffic->samples] = now;
			add(&traffic->bytes, len);
			add(&traffic->messages, 1);
			/* Last, so that who reads `samples` finds what it counts. */
			__atomic_store_n(&traffic->samples, traffic->samples + 1, __ATOMIC_RELEASE);
		}
	}
}
