/* The engines `mmsg` and `gso`: one loop, that drains both descriptors in bounded turns until
 * neither has anything, and only then sleeps. There is no timer in it.
 *
 * Before sleeping it may poll for a while (ski rental: about as long as a wakeup from another
 * CPU takes), and yields the CPU between two looks, so that whoever makes the next packet can
 * run. It does so only while that pays, and never in bulk traffic, where there is no one
 * packet somebody waits for. */
#include "batch.h"

#include <assert.h>
#include <errno.h>
#include <sched.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

enum {
	EVENT_COUNT = 3,
	SPIN_CREDIT_MAX = 8,
	SPIN_MISS_COST = 2,
	BULK_LEN = 8192, /* bytes between two waits: more is no request or answer */
	CALM_WAITS = 16, /* so many waits after bulk traffic, it is over */
};

static const uint64_t NS_PER_S = 1000000000u;

static_assert(sizeof(struct tundp_vnet) == TUNDP_VNET_LEN, "linux/virtio_net.h");
static_assert(COALESCE_BUFFERS * COALESCE_BUFFER_LEN == TUNDP_COALESCE_SCRATCH, "tundp.h");

size_t tundp_batch_len(void)
{
	return sizeof(struct tundp_batch);
}

void batch_lose(struct tundp_batch *batch, uint32_t offload)
{
	struct tundp_worker *worker = batch->worker;

	__atomic_store_n(&worker->offloads_lost, worker->offloads_lost | offload,
			 __ATOMIC_RELAXED);
	worker_notify(worker);
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

struct waiting {
	int epoll_fd;
	bool is_tun_ready;
	bool is_udp_ready;
	bool has_room;        /* for runs that waited */
	bool is_tun_lost;     /* it reports an error: reading it will say which */
	uint32_t spin_credit; /* above 0: recent gaps were short enough to poll through */
	uint64_t bytes_in;    /* in both directions, until the last wait */
	uint32_t calm_waits;  /* since there was bulk traffic */
	bool is_room_watched; /* epoll tells when the socket has room */
};

static int watch(int epoll_fd, int operation, int fd, uint32_t events)
{
	struct epoll_event event = { .events = events, .data.fd = fd };

	return epoll_ctl(epoll_fd, operation, fd, &event) ? -errno : 0;
}

/* While runs wait for room in the socket, the TUN is left alone and the socket's room is
 * waited for; datagrams are received all the while. */
static void watch_room(struct tundp_batch *batch, struct waiting *waiting)
{
	const struct tundp_worker *worker = batch->worker;
	const uint32_t in = worker->directions & TUNDP_DECAP ? EPOLLIN : 0;
	const uint32_t tun_events = batch->is_blocked ? 0 : EPOLLIN;
	const uint32_t udp_events = in | (batch->is_blocked ? EPOLLOUT : 0);

	if (batch->is_blocked == waiting->is_room_watched)
		return;
	waiting->is_room_watched = batch->is_blocked;
	(void)watch(waiting->epoll_fd, EPOLL_CTL_MOD, worker->tun_fd, tun_events);
	(void)watch(waiting->epoll_fd, EPOLL_CTL_MOD, worker->udp_fd, udp_events);
}

/* One epoll_wait; true if it brought anything. */
static bool look(struct tundp_worker *worker, struct waiting *waiting, int timeout_ms)
{
	struct epoll_event events[EVENT_COUNT];
	int count = epoll_wait(waiting->epoll_fd, events, EVENT_COUNT, timeout_ms);

	worker->counters.syscalls++;
	for (int i = 0; i < count; i++) {
		const uint32_t what = events[i].events;

		if (events[i].data.fd == worker->control_fd) {
			worker_drain_control(worker);
		} else if (events[i].data.fd == worker->tun_fd) {
			waiting->is_tun_ready = true;
			waiting->is_tun_lost = what & (EPOLLERR | EPOLLHUP);
		} else {
			if (what & ~(uint32_t)EPOLLOUT)
				waiting->is_udp_ready = worker->directions & TUNDP_DECAP;
			if (what & ~(uint32_t)EPOLLIN)
				waiting->has_room = true;
		}
	}
	return count > 0;
}

static bool spin(struct tundp_worker *worker, struct waiting *waiting)
{
	const uint64_t until = now_ns() + worker->spin_ns;

	worker->counters.spins++;
	do {
		if (look(worker, waiting, 0)) {
			worker->counters.spin_hits++;
			if (waiting->spin_credit < SPIN_CREDIT_MAX)
				waiting->spin_credit++;
			return true;
		}
		(void)sched_yield();
	} while (now_ns() < until);
	/* Yielding may have taken long: what came meanwhile is a hit all the same. */
	if (look(worker, waiting, 0)) {
		worker->counters.spin_hits++;
		return true;
	}
	waiting->spin_credit -=
		waiting->spin_credit < SPIN_MISS_COST ? waiting->spin_credit : SPIN_MISS_COST;
	return false;
}

/* Until something is there. A sleep that was shorter than a spin would have been earns
 * credit for spinning; with no credit left an idle worker sleeps at once. */
static void wait(struct tundp_worker *worker, struct waiting *waiting)
{
	const uint64_t bytes_in =
		worker->counters.encap.bytes_in + worker->counters.decap.bytes_in;
	uint64_t slept_at = 0;
	bool may_spin;

	if (bytes_in - waiting->bytes_in >= BULK_LEN)
		waiting->calm_waits = 0;
	else if (waiting->calm_waits < CALM_WAITS)
		waiting->calm_waits++;
	may_spin = worker->spin_ns && waiting->calm_waits == CALM_WAITS;
	waiting->bytes_in = bytes_in;
	if (look(worker, waiting, 0))
		return;
	if (may_spin) {
		if (waiting->spin_credit && spin(worker, waiting))
			return;
		slept_at = now_ns();
	}
	worker->counters.wakeups++;
	(void)look(worker, waiting, -1);
	if (may_spin && now_ns() - slept_at < worker->spin_ns &&
	    waiting->spin_credit < SPIN_CREDIT_MAX)
		waiting->spin_credit++;
}

static int run(struct tundp_batch *batch, struct waiting *waiting)
{
	struct tundp_worker *worker = batch->worker;

	while (!worker_is_stopped(worker) && !batch->tun_error) {
		batch->fib = worker_fib(worker);
		if (waiting->has_room) {
			waiting->has_room = false;
			batch_encap_resume(batch);
		}
		if (waiting->is_tun_lost && batch->is_blocked)
			batch_encap_abandon(batch);
		if (waiting->is_udp_ready)
			waiting->is_udp_ready = batch_decap_turn(batch);
		if (waiting->is_tun_ready && !batch->is_blocked)
			waiting->is_tun_ready = batch_encap_turn(batch);
		watch_room(batch, waiting);
		/* Whoever waited for room in the socket may have drained the control
		 * descriptor: the flag is what counts. */
		if (worker_is_stopped(worker))
			break;
		/* One side that is never done must not hide what the other has. */
		if (waiting->is_udp_ready || (waiting->is_tun_ready && !batch->is_blocked))
			(void)look(worker, waiting, 0);
		else
			wait(worker, waiting);
	}
	batch_encap_abandon(batch);
	return -batch->tun_error;
}

int tundp_batch_run(struct tundp_worker *worker)
{
	struct tundp_batch *batch = worker->batch;
	struct waiting waiting = { .epoll_fd = epoll_create1(EPOLL_CLOEXEC) };
	int code = 0;

	if (waiting.epoll_fd < 0)
		return -errno;
	worker_begin(worker);
	batch->worker = worker;
	batch->sums = sums_best();
	batch->tun_error = 0;
	batch->run_count = 0;
	batch->arena_len = 0;
	batch->is_blocked = false;
	batch->refusals = 0;
	batch_encap_init(batch);
	batch_decap_init(batch);
	if (worker->directions & TUNDP_ENCAP)
		code = watch(waiting.epoll_fd, EPOLL_CTL_ADD, worker->tun_fd, EPOLLIN);
	if (!code)
		code = watch(waiting.epoll_fd, EPOLL_CTL_ADD, worker->udp_fd,
			     worker->directions & TUNDP_DECAP ? EPOLLIN : 0);
	if (!code)
		code = watch(waiting.epoll_fd, EPOLL_CTL_ADD, worker->control_fd, EPOLLIN);
	if (!code)
		code = run(batch, &waiting);
	close(waiting.epoll_fd);
	return code;
}
