/* Lock-free exchange between the controlling thread (Python) and a running worker: FIBs, stop,
 * heartbeat, disabled offloads. */
#include "publish.h"

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>

#include "socket_wait.h"

/* A sanity limit above what any kernel takes (UDP_MAX_SEGMENTS is 128): the kernel refuses more
 * than it takes with EINVAL. */
enum { SEGMENTS_MAX = 1024 };

static_assert(sizeof(struct tundp_hop) == 8, "lease/fib.py's HOP_DTYPE");

/* Counts an iteration of the loop. One writer: a plain addition, stored atomically. */
static void beat(struct tundp_worker *worker)
{
	uint64_t *heartbeats = &worker->shared.heartbeats;

	__atomic_store_n(heartbeats, *heartbeats + 1, __ATOMIC_RELAXED);
}

void publish_name_thread(const struct tundp_worker *worker)
{
	(void)prctl(PR_SET_NAME, worker->config.name);
}

static void next_taps(struct tundp_worker *worker)
{
	const struct tundp_taps *taps = __atomic_load_n(&worker->control.taps, __ATOMIC_ACQUIRE);

	if (taps && taps->count && taps->asked != worker->waits.asked)
		socket_wait_begin(worker, taps->asked);
	worker->taps = taps && taps->count ? taps : NULL;
	if (taps)
		__atomic_store_n(&worker->shared.taps_seen, taps->generation, __ATOMIC_RELEASE);
}

const struct tundp_fib *publish_next_fib(struct tundp_worker *worker)
{
	const struct tundp_fib *fib = __atomic_load_n(&worker->control.fib, __ATOMIC_ACQUIRE);

	beat(worker);
	__atomic_store_n(&worker->shared.seen, fib->generation, __ATOMIC_RELEASE);
	next_taps(worker);
	return fib;
}

bool publish_is_stopped(const struct tundp_worker *worker)
{
	return __atomic_load_n(&worker->control.stop, __ATOMIC_ACQUIRE);
}

void publish_news(struct tundp_worker *worker)
{
	if (worker->config.notify_fd < 0)
		return;
	worker->counters.syscalls++;
	(void)eventfd_write(worker->config.notify_fd, 1);
}

void publish_drain_control(struct tundp_worker *worker)
{
	eventfd_t value;

	beat(worker);
	worker->counters.syscalls++;
	(void)eventfd_read(worker->config.control_fd, &value);
}

void publish_disable(struct tundp_worker *worker, uint32_t offload)
{
	__atomic_fetch_or(&worker->shared.offloads_disabled, offload, __ATOMIC_RELAXED);
	publish_news(worker);
}

void tundp_worker_init(struct tundp_worker *worker)
{
	memset(worker, 0, sizeof(*worker));
	worker->config.control_fd = -1;
	worker->config.notify_fd = -1;
	worker->config.echo_fd = -1;
	worker->config.peer_fd = -1;
}

int tundp_worker_configure(struct tundp_worker *worker, const struct tundp_worker_config *config)
{
	const uint32_t both = TUNDP_ENCAP | TUNDP_DECAP;

	if (config->udp_fd < 0 || config->control_fd < 0 || !config->memory ||
	    !config->hop_counters || !config->hop_queues || !config->icmp_full_at_ns)
		return -EINVAL;
	if (!config->directions || config->directions & ~both || config->max_segments < 1 ||
	    config->max_segments > SEGMENTS_MAX || config->max_udp_segments < 1 ||
	    config->max_udp_segments > SEGMENTS_MAX)
		return -EINVAL;
	worker->config = *config;
	worker->config.name[TUNDP_NAME_LEN - 1] = 0;
	worker->control.stop = 0;
	return 0;
}

void tundp_worker_rebound(struct tundp_worker *worker)
{
	worker->shared.overflows = 0;
	socket_wait_begin(worker, worker->waits.asked);
}

void tundp_worker_install(struct tundp_worker *worker, const struct tundp_fib *fib)
{
	__atomic_store_n(&worker->control.fib, fib, __ATOMIC_RELEASE);
	(void)eventfd_write(worker->config.control_fd, 1);
}

void tundp_worker_tap(struct tundp_worker *worker, const struct tundp_taps *taps)
{
	__atomic_store_n(&worker->control.taps, taps, __ATOMIC_RELEASE);
	(void)eventfd_write(worker->config.control_fd, 1);
}

uint64_t tundp_worker_taps_seen(const struct tundp_worker *worker)
{
	return __atomic_load_n(&worker->shared.taps_seen, __ATOMIC_ACQUIRE);
}

void tundp_worker_stop(struct tundp_worker *worker)
{
	__atomic_store_n(&worker->control.stop, 1, __ATOMIC_RELEASE);
	(void)eventfd_write(worker->config.control_fd, 1);
}

uint32_t tundp_worker_disabled(const struct tundp_worker *worker)
{
	return __atomic_load_n(&worker->shared.offloads_disabled, __ATOMIC_RELAXED);
}

void tundp_worker_restore(struct tundp_worker *worker)
{
	__atomic_store_n(&worker->shared.offloads_disabled, 0, __ATOMIC_RELAXED);
}

uint32_t tundp_worker_hop_sockets(const struct tundp_worker *worker)
{
	return __atomic_load_n(&worker->shared.hop_sockets, __ATOMIC_RELAXED);
}

uint64_t tundp_worker_seen(const struct tundp_worker *worker)
{
	return __atomic_load_n(&worker->shared.seen, __ATOMIC_ACQUIRE);
}

uint64_t tundp_worker_heartbeat(struct tundp_worker *worker)
{
	(void)eventfd_write(worker->config.control_fd, 1);
	return __atomic_load_n(&worker->shared.heartbeats, __ATOMIC_RELAXED);
}
