/* The engines `mmsg` and `gso`: one loop, that drains both descriptors in bounded iterations until
 * neither has anything, and only then sleeps. There is no timer in it.
 *
 * Before sleeping it may poll for a while (ski rental: about as long as a wakeup from another
 * CPU takes), and yields the CPU between two polls, so that whoever makes the next packet can
 * run. It does so only while that pays, and never in bulk traffic, where there is no one
 * packet somebody waits for. */
#include "batch.h"

#include <errno.h>
#include <sched.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "clock.h"
#include "publish.h"

enum {
	EVENT_COUNT = 3,
	SPIN_CREDIT_MAX = 8,
	SPIN_MISS_COST = 2,
	BULK_LEN = 8192, /* bytes between two waits: more is no request or answer */
	CALM_WAITS = 16, /* so many waits after bulk traffic, it is over */
};

size_t tundp_batch_len(void)
{
	return sizeof(struct batch);
}

struct waiting {
	int epoll_fd;
	bool is_tun_ready;
	bool is_udp_ready;
	uint32_t spin_credit; /* above 0: recent gaps were short enough to poll through */
	uint64_t bytes_in;    /* in both directions, until the last wait */
	uint32_t calm_waits;  /* since there was bulk traffic */
};

static int watch(int epoll_fd, int fd, uint32_t events)
{
	struct epoll_event event = { .events = events, .data.fd = fd };

	return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

/* One epoll_wait; true if it brought anything. */
static bool poll_events(struct tundp_worker *worker, struct waiting *waiting, int timeout_ms)
{
	struct epoll_event events[EVENT_COUNT];
	int count = epoll_wait(waiting->epoll_fd, events, EVENT_COUNT, timeout_ms);

	worker->counters.syscalls++;
	for (int i = 0; i < count; i++) {
		if (events[i].data.fd == worker->config.control_fd)
			publish_drain_control(worker);
		else if (events[i].data.fd == worker->config.tun_fd)
			waiting->is_tun_ready = true;
		else
			waiting->is_udp_ready = worker->config.directions & TUNDP_DECAP;
	}
	return count > 0;
}

static bool spin(struct tundp_worker *worker, struct waiting *waiting)
{
	const uint64_t until = clock_now_ns() + worker->config.spin_ns;

	worker->counters.spins++;
	do {
		if (poll_events(worker, waiting, 0)) {
			worker->counters.spin_hits++;
			if (waiting->spin_credit < SPIN_CREDIT_MAX)
				waiting->spin_credit++;
			return true;
		}
		(void)sched_yield();
	} while (clock_now_ns() < until);
	/* Yielding may have taken long: what arrived meanwhile counts as a hit. */
	if (poll_events(worker, waiting, 0)) {
		worker->counters.spin_hits++;
		return true;
	}
	waiting->spin_credit -= waiting->spin_credit < SPIN_MISS_COST ? waiting->spin_credit :
									SPIN_MISS_COST;
	return false;
}

/* Waits until a descriptor is ready. A sleep shorter than a spin would have been earns credit
 * for spinning; with no credit left an idle worker sleeps at once. */
static void wait(struct tundp_worker *worker, struct waiting *waiting)
{
	const uint64_t bytes_in = worker->counters.encap.bytes_in + worker->counters.decap.bytes_in;
	uint64_t slept_at = 0;
	bool may_spin;

	if (bytes_in - waiting->bytes_in >= BULK_LEN)
		waiting->calm_waits = 0;
	else if (waiting->calm_waits < CALM_WAITS)
		waiting->calm_waits++;
	may_spin = worker->config.spin_ns && waiting->calm_waits == CALM_WAITS;
	waiting->bytes_in = bytes_in;
	if (poll_events(worker, waiting, 0))
		return;
	if (may_spin) {
		if (waiting->spin_credit && spin(worker, waiting))
			return;
		slept_at = clock_now_ns();
	}
	worker->counters.wakeups++;
	(void)poll_events(worker, waiting, -1);
	if (may_spin && clock_now_ns() - slept_at < worker->config.spin_ns &&
	    waiting->spin_credit < SPIN_CREDIT_MAX)
		waiting->spin_credit++;
}

static int serve(struct batch *batch, struct waiting *waiting)
{
	struct tundp_worker *worker = batch->worker;

	while (!publish_is_stopped(worker) && !batch->tun_error) {
		batch->fib = publish_next_fib(worker);
		hop_sockets_sweep(worker);
		if (waiting->is_udp_ready)
			waiting->is_udp_ready = batch_decap_iteration(batch);
		if (waiting->is_tun_ready)
			waiting->is_tun_ready = batch_encap_iteration(batch);
		/* A direction that is always ready must not starve the other. */
		if (waiting->is_udp_ready || waiting->is_tun_ready)
			(void)poll_events(worker, waiting, 0);
		else
			wait(worker, waiting);
	}
	return -batch->tun_error;
}

int tundp_batch_run(struct tundp_worker *worker)
{
	struct batch *batch = worker->config.memory;
	struct waiting waiting = { .epoll_fd = epoll_create1(EPOLL_CLOEXEC) };
	int code = 0;

	if (waiting.epoll_fd < 0)
		return -errno;
	publish_name_thread(worker);
	batch->worker = worker;
	batch->sums = sums_best();
	batch->tun_error = 0;
	hop_sockets_begin(worker);
	batch_encap_init(batch);
	batch_decap_init(batch);
	if (worker->config.directions & TUNDP_ENCAP)
		code = watch(waiting.epoll_fd, worker->config.tun_fd, EPOLLIN);
	if (!code)
		code = watch(waiting.epoll_fd, worker->config.udp_fd,
			     worker->config.directions & TUNDP_DECAP ? EPOLLIN : 0);
	if (!code)
		code = watch(waiting.epoll_fd, worker->config.control_fd, EPOLLIN);
	if (!code)
		code = serve(batch, &waiting);
	hop_sockets_end(worker);
	close(waiting.epoll_fd);
	return code;
}
