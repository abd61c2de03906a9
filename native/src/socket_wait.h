/* The time a datagram waited in the UDP socket, from its receive timestamp. Python twin:
 * wire/socket_wait.py. */
#ifndef TUNDP_SOCKET_WAIT_H
#define TUNDP_SOCKET_WAIT_H

#include <string.h>
#include <sys/socket.h>

#include "clock.h"
#include "tundp.h"

/* SO_TIMESTAMPING_NEW, asm-generic/socket.h; absent from some libc headers. */
enum { SOCKET_WAIT_STAMPS = 65 };

/* struct scm_timestamping64, linux/errqueue.h. */
struct socket_wait_stamps {
	struct {
		int64_t seconds;
		int64_t nanoseconds;
	} software, unused, hardware;
};

static inline struct tundp_clocks socket_wait_clocks(void)
{
	return (struct tundp_clocks){ .real_ns = clock_read_ns(CLOCK_REALTIME),
				      .monotonic_ns = clock_now_ns() };
}

/* The time since a stamp, ns: 1 to TUNDP_WAIT_MAX, 0 not known. */
static inline uint32_t socket_wait_ns(uint64_t stamp_ns, const struct tundp_clocks *now,
				      const struct tundp_clocks *before)
{
	const int64_t elapsed = (int64_t)(now->monotonic_ns - before->monotonic_ns);
	const int64_t drift = (int64_t)(now->real_ns - before->real_ns) - elapsed;
	const int64_t wait = (int64_t)(now->real_ns - stamp_ns);

	if ((drift < 0 ? -drift : drift) >
	    TUNDP_WAIT_STEP_NS + (elapsed >> TUNDP_WAIT_SLEW_SHIFT))
		return 0;
	if (wait < 1)
		return 1;
	return wait > TUNDP_WAIT_MAX ? TUNDP_WAIT_MAX : (uint32_t)wait;
}

/* Call when timestamps were asked for anew, or the socket is another one. */
static inline void socket_wait_begin(struct tundp_worker *worker, uint32_t asked)
{
	const struct tundp_clocks now = socket_wait_clocks();

	worker->waits = (struct tundp_socket_waits){
		.before = now,
		.now = now,
		.called_ns = now.real_ns,
		.asked = asked,
	};
}

/* Call before a receive, and after one that brought something. */
static inline void socket_wait_call(struct tundp_worker *worker)
{
	if (worker->taps)
		worker->waits.called_ns = clock_read_ns(CLOCK_REALTIME);
}

static inline void socket_wait_returned(struct tundp_worker *worker)
{
	if (!worker->taps)
		return;
	worker->waits.before = worker->waits.now;
	worker->waits.now = socket_wait_clocks();
}

/* The wait a control message speaks of, or `wait_ns` if it speaks of something else. */
static inline uint32_t socket_wait_of(struct tundp_worker *worker, const struct cmsghdr *control,
				      uint32_t wait_ns)
{
	struct tundp_socket_waits *waits = &worker->waits;
	struct socket_wait_stamps stamps;
	uint64_t stamp_ns;

	if (control->cmsg_level != SOL_SOCKET || control->cmsg_type != SOCKET_WAIT_STAMPS ||
	    !worker->taps)
		return wait_ns;
	memcpy(&stamps, CMSG_DATA(control), sizeof(stamps));
	stamp_ns = (uint64_t)stamps.software.seconds * 1000000000u +
		   (uint64_t)stamps.software.nanoseconds;
	if (stamp_ns < waits->called_ns)
		waits->is_stamping = 1;
	return waits->is_stamping ? socket_wait_ns(stamp_ns, &waits->now, &waits->before) : 0;
}

#endif
