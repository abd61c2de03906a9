/* Theory of operation: see traffic.h. Sockets come from Python with receive and send
 * timeouts set, so every loop looks at `stop` a few times a second. Sequence numbers are in
 * the machine's byte order: both ends are on it. */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "loop.h"

enum { SEED = 0x2545f491 };

void traffic_pattern(uint8_t *pattern)
{
	uint32_t state = SEED;

	for (size_t i = 0; i < TRAFFIC_PERIOD; i++) {
		state ^= state << 13;
		state ^= state >> 17;
		state ^= state << 5;
		pattern[i] = (uint8_t)state;
	}
	for (size_t i = TRAFFIC_PERIOD; i < TRAFFIC_PERIOD + TRAFFIC_PIECE; i++)
		pattern[i] = pattern[i - TRAFFIC_PERIOD];
}

void traffic_stream_send(int fd, const uint8_t *pattern, struct traffic *traffic)
{
	while (!is_stopped(traffic)) {
		ssize_t sent = send(fd, pattern + traffic->bytes % TRAFFIC_PERIOD, TRAFFIC_PIECE,
				    MSG_NOSIGNAL);

		if (sent < 0 && is_passing(errno))
			continue;
		if (sent < 0) {
			traffic->error = errno;
			return;
		}
		add(&traffic->bytes, (uint64_t)sent);
		add(&traffic->messages, 1);
	}
}

/* How long the stream has had nothing, if that is the longest so far. */
static void note_stall(struct traffic *traffic, uint64_t *last_ns, int has_come)
{
	uint64_t now = clock_ns(CLOCK_MONOTONIC);

	if (now - *last_ns > traffic->stall_ns) {
		set(&traffic->stall_at_ns, *last_ns);
		set(&traffic->stall_ns, now - *last_ns);
	}
	if (has_come)
		*last_ns = now;
}

void traffic_stream_receive(int fd, const uint8_t *pattern, struct traffic *traffic)
{
	static _Thread_local uint8_t buffer[TRAFFIC_PIECE];
	uint64_t last_ns = clock_ns(CLOCK_MONOTONIC);

	for (;;) {
		ssize_t got = recv(fd, buffer, sizeof(buffer), 0);

		note_stall(traffic, &last_ns, got > 0);
		if (got == 0)
			return;
		if (got < 0 && is_passing(errno)) {
			if (is_stopped(traffic))
				return;
			continue;
		}
		if (got < 0) {
			traffic->error = errno;
			return;
		}
		if (memcmp(buffer, pattern + traffic->bytes % TRAFFIC_PERIOD, (size_t)got))
			add(&traffic->corrupt, 1);
		add(&traffic->bytes, (uint64_t)got);
		add(&traffic->messages, 1);
	}
}

void traffic_datagram_send(int fd, const uint8_t *pattern, uint32_t size, uint32_t per_ms,
			   uint64_t run, struct traffic *traffic)
{
	struct datagram datagrams[BATCH];
	struct mmsghdr messages[BATCH];
	uint64_t next_ns = clock_ns(CLOCK_MONOTONIC);
	uint64_t sequence = 0;

	memset(messages, 0, sizeof(messages));
	while (!is_stopped(traffic)) {
		unsigned int quota = per_ms ? per_ms : BATCH;

		while (quota && !is_stopped(traffic)) {
			unsigned int count = quota < BATCH ? quota : BATCH;
			int sent;

			for (unsigned int i = 0; i < count; i++)
				number_datagram(&datagrams[i], &messages[i].msg_hdr, pattern, size,
						sequence + i, run);
			sent = sendmmsg(fd, messages, count, 0);
			if (sent < 0) {
				if (errno == ENOBUFS || errno == ECONNREFUSED || is_passing(errno)) {
					add(&traffic->refused, 1);
					if (per_ms)
						break;
					continue;
				}
				traffic->error = errno;
				return;
			}
			sequence += (uint64_t)sent;
			quota -= (unsigned int)sent;
			add(&traffic->messages, (uint64_t)sent);
			add(&traffic->bytes, (uint64_t)sent * size);
		}
		if (per_ms) {
			next_ns += NS_PER_MS;
			sleep_until(next_ns);
		}
	}
}

/* Checks one datagram and counts it. */
static void take(const uint8_t *data, size_t len, const uint8_t *pattern, size_t size,
		 uint64_t run, uint8_t *seen, uint64_t seen_bits, uint64_t *highest, struct traffic *traffic)
{
	uint64_t sequence, bit;

	if (!read_number(data, len, pattern, size, run, &sequence, traffic))
		return;
	bit = sequence & (seen_bits - 1);
	if (sequence > *highest) {
		/* The bitmap is a window: what it forgets makes room for what comes. */
		uint64_t from = *highest + 1 + seen_bits <= sequence ? sequence : *highest + 1;

		for (uint64_t n = from; n <= sequence; n++)
			seen[(n & (seen_bits - 1)) / 8] &= (uint8_t)~(1u << (n & 7));
		*highest = sequence;
	} else if (sequence < *highest) {
		add(&traffic->reordered, 1);
	}
	if (seen[bit / 8] & 1u << (bit & 7)) {
		add(&traffic->duplicates, 1);
		return;
	}
	seen[bit / 8] |= (uint8_t)(1u << (bit & 7));
	add(&traffic->messages, 1);
	add(&traffic->bytes, len);
}

void traffic_datagram_receive(int fd, const uint8_t *pattern, uint32_t size, uint64_t run,
			      uint8_t *seen, uint64_t seen_bits, struct traffic *traffic)
{
	static _Thread_local struct inbox inbox;
	uint64_t highest = 0;

	open_inbox(&inbox);
	while (!is_stopped(traffic)) {
		int got = receive_datagrams(fd, &inbox, traffic);

		if (got < 0)
			return;
		for (int i = 0; i < got; i++)
			take(inbox.buffers[i], inbox.messages[i].msg_len, pattern, size, run, seen,
			     seen_bits, &highest, traffic);
	}
}

enum { MESSAGE_END = -2, MESSAGE_ERROR = -1, MESSAGE_NONE = 0, MESSAGE_WHOLE = 1 };

/* One of the four above; none means that nothing came in time. */
static int receive_message(int fd, int is_stream, uint8_t *buffer, uint32_t size)
{
	uint32_t have = 0;

	do {
		ssize_t got = recv(fd, buffer + have, size - have, 0);

		if (got == 0 && is_stream)
			return MESSAGE_END;
		if (got < 0 && is_passing(errno) && have == 0)
			return MESSAGE_NONE;
		if (got < 0 && is_passing(errno))
			continue;
		if (got < 0)
			return MESSAGE_ERROR;
		have += (uint32_t)got;
	} while (is_stream && have < size);
	return MESSAGE_WHOLE;
}

void traffic_request(int fd, int is_stream, uint32_t size, uint32_t *samples_ns,
		     uint64_t capacity, struct traffic *traffic)
{
	static _Thread_local uint8_t out[MESSAGE_MAX], in[MESSAGE_MAX];
	uint64_t number = 0;

	while (!is_stopped(traffic)) {
		uint64_t started = clock_ns(CLOCK_MONOTONIC), took;
		int got;

		memcpy(out, &number, sizeof(number));
		if (send(fd, out, size, MSG_NOSIGNAL) < 0 && !is_passing(errno)) {
			traffic->error = errno;
			return;
		}
		do {
			got = receive_message(fd, is_stream, in, size);
			/* A late answer to an earlier question is not the one to this. */
		} while (got > 0 && memcmp(in, out, sizeof(number)) && !is_stopped(traffic));
		if (got < 0) {
			traffic->error = got == MESSAGE_END ? ECONNRESET : errno;
			return;
		}
		number++;
		if (got == MESSAGE_NONE) {
			add(&traffic->lost, 1);
			continue;
		}
		took = clock_ns(CLOCK_MONOTONIC) - started;
		samples_ns[traffic->samples % capacity] = took > UINT32_MAX ? UINT32_MAX : (uint32_t)took;
		add(&traffic->samples, 1);
		add(&traffic->messages, 1);
		add(&traffic->bytes, 2 * (uint64_t)size);
	}
}

void traffic_answer(int fd, int is_stream, uint32_t size, struct traffic *traffic)
{
	static _Thread_local uint8_t buffer[MESSAGE_MAX];

	while (!is_stopped(traffic)) {
		struct sockaddr_in from;
		socklen_t from_len = sizeof(from);
		ssize_t got;

		if (is_stream) {
			int whole = receive_message(fd, 1, buffer, size);

			if (whole < 0)
				return;
			if (whole == MESSAGE_NONE)
				continue;
			got = send(fd, buffer, size, MSG_NOSIGNAL);
		} else {
			got = recvfrom(fd, buffer, sizeof(buffer), 0, (struct sockaddr *)&from,
				       &from_len);
			if (got > 0)
				got = sendto(fd, buffer, (size_t)got, 0,
					     (const struct sockaddr *)&from, from_len);
		}
		if (got < 0 && !is_passing(errno) && errno != ECONNREFUSED) {
			traffic->error = errno;
			return;
		}
		if (got > 0)
			add(&traffic->messages, 1);
	}
}

void traffic_connect(uint32_t address, uint16_t port, struct traffic *traffic)
{
	const struct sockaddr_in to = { .sin_family = AF_INET,
					.sin_port = htons(port),
					.sin_addr.s_addr = htonl(address) };
	const struct timeval patience = { .tv_usec = 500000 };

	while (!is_stopped(traffic)) {
		int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
		uint8_t byte = 'x';

		errno = 0;
		if (fd < 0) {
			traffic->error = errno;
			return;
		}
		setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
		setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
		if (connect(fd, (const struct sockaddr *)&to, sizeof(to)) == 0 &&
		    send(fd, &byte, 1, MSG_NOSIGNAL) == 1 && recv(fd, &byte, 1, 0) == 1)
			add(&traffic->messages, 1);
		else
			add(&traffic->lost, 1);
		/* Out of ports: going on at full speed would measure nothing but that. */
		if (errno == EADDRNOTAVAIL)
			traffic->error = errno;
		close(fd);
		if (traffic->error)
			return;
	}
}

void traffic_accept(int fd, struct traffic *traffic)
{
	while (!is_stopped(traffic)) {
		int connection = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
		uint8_t byte;

		if (connection < 0 && is_passing(errno))
			continue;
		if (connection < 0) {
			traffic->error = errno;
			return;
		}
		if (recv(connection, &byte, 1, 0) == 1 &&
		    send(connection, &byte, 1, MSG_NOSIGNAL) == 1)
			add(&traffic->messages, 1);
		/* The one that asked closes first, and keeps the TIME_WAIT. */
		(void)recv(connection, &byte, 1, 0);
		close(connection);
	}
}

uint64_t traffic_burn(uint64_t ns)
{
	uint64_t started = clock_ns(CLOCK_THREAD_CPUTIME_ID), burnt = 0;
	volatile uint64_t sink = 0;

	while (burnt < ns) {
		for (int i = 0; i < 10000; i++)
			sink += (uint64_t)i;
		burnt = clock_ns(CLOCK_THREAD_CPUTIME_ID) - started;
	}
	return burnt;
}
