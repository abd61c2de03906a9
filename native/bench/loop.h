/* What every loop of the generators does: see traffic.h. A struct traffic has one writer, its
 * thread; Python reads it meanwhile. */
#ifndef TUNDP_TRAFFIC_LOOP_H
#define TUNDP_TRAFFIC_LOOP_H

#include <errno.h>
#include <netinet/in.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include "traffic.h"

enum {
	BATCH = 64,
	HEADER_LEN = 16, /* a number and a run, both in the machine's byte order */
	DATAGRAM_MAX = 9216,
	MESSAGE_MAX = 65536,
};

static const uint64_t NS_PER_S = 1000000000u;
static const uint64_t NS_PER_MS = 1000000u;

/* One to send; its payload is a piece of the pattern. */
struct datagram {
	uint8_t header[HEADER_LEN];
	struct iovec pieces[2];
};

/* What one system call receives. */
struct inbox {
	uint8_t buffers[BATCH][DATAGRAM_MAX];
	struct iovec pieces[BATCH];
	struct mmsghdr messages[BATCH];
};

static inline int is_stopped(const struct traffic *traffic)
{
	return __atomic_load_n(&traffic->stop, __ATOMIC_RELAXED);
}

static inline void set(uint64_t *counter, uint64_t value)
{
	__atomic_store_n(counter, value, __ATOMIC_RELAXED);
}

static inline void add(uint64_t *counter, uint64_t value)
{
	set(counter, *counter + value);
}

static inline uint64_t clock_ns(clockid_t id)
{
	struct timespec now;

	clock_gettime(id, &now);
	return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

static inline void sleep_until(uint64_t at_ns)
{
	struct timespec until = { .tv_sec = (time_t)(at_ns / NS_PER_S),
				  .tv_nsec = (long)(at_ns % NS_PER_S) };

	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
}

/* Timeouts and interruptions are looked past; anything else ends the loop. */
static inline int is_passing(int error)
{
	return error == EAGAIN || error == EINTR;
}

/* Makes `message` carry datagram `number` of `run`: `size` bytes, pieces borrowed from both. */
static inline void number_datagram(struct datagram *datagram, struct msghdr *message,
				   const uint8_t *pattern, uint32_t size, uint64_t number,
				   uint64_t run)
{
	memcpy(datagram->header, &number, sizeof(number));
	memcpy(datagram->header + sizeof(number), &run, sizeof(run));
	datagram->pieces[0] = (struct iovec){ datagram->header, HEADER_LEN };
	datagram->pieces[1] = (struct iovec){
		(void *)(uintptr_t)(pattern + number % TRAFFIC_PERIOD),
		size - HEADER_LEN,
	};
	message->msg_iov = datagram->pieces;
	message->msg_iovlen = 2;
}

/* Whether it is whole and of this run, and then its number; counted as corrupt or stale else. */
static inline int read_number(const uint8_t *data, size_t len, const uint8_t *pattern, size_t size,
			      uint64_t run, uint64_t *number, struct traffic *traffic)
{
	uint64_t its_run;

	if (len < HEADER_LEN) {
		add(&traffic->corrupt, 1);
		return 0;
	}
	memcpy(number, data, sizeof(*number));
	memcpy(&its_run, data + sizeof(*number), sizeof(its_run));
	if (its_run != run) {
		add(&traffic->stale, 1);
		return 0;
	}
	if (len != size ||
	    memcmp(data + HEADER_LEN, pattern + *number % TRAFFIC_PERIOD, len - HEADER_LEN)) {
		add(&traffic->corrupt, 1);
		return 0;
	}
	return 1;
}

static inline void open_inbox(struct inbox *inbox)
{
	memset(inbox->messages, 0, sizeof(inbox->messages));
	for (unsigned int i = 0; i < BATCH; i++) {
		inbox->pieces[i] = (struct iovec){ inbox->buffers[i], DATAGRAM_MAX };
		inbox->messages[i].msg_hdr.msg_iov = &inbox->pieces[i];
		inbox->messages[i].msg_hdr.msg_iovlen = 1;
	}
}

/* How many datagrams came, 0 if none did in time, -1 after an error that ends the loop. */
static inline int receive_datagrams(int fd, struct inbox *inbox, struct traffic *traffic)
{
	int got = recvmmsg(fd, inbox->messages, BATCH, MSG_WAITFORONE, NULL);

	if (got < 0 && (is_passing(errno) || errno == ECONNREFUSED))
		return 0;
	if (got < 0)
		traffic->error = errno;
	return got;
}

#endif
