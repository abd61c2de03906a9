/* What Python and a running worker say to each other: FIBs, stop, heartbeat, disabled offloads. */
#include <assert.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>

#include "worker.h"

static const uint64_t NS_PER_S = 1000000000u;

static_assert(sizeof(struct tundp_hop) == 8, "lease/fib.py's HOP_DTYPE");

/* Nobody else writes it, so that it needs no locked addition. */
static void beat(struct tundp_worker *worker)
{
	__atomic_store_n(&worker->beats, worker->beats + 1, __ATOMIC_RELAXED);
}

const struct tundp_fib *worker_fib(struct tundp_worker *worker)
{
	const struct tundp_fib *fib = __atomic_load_n(&worker->fib, __ATOMIC_ACQUIRE);

	beat(worker);
	__atomic_store_n(&worker->seen, fib->generation, __ATOMIC_RELEASE);
	return fib;
}

void worker_begin(const struct tundp_worker *worker)
{
	(void)prctl(PR_SET_NAME, worker->name);
}

bool worker_is_stopped(const struct tundp_worker *worker)
{
	return __atomic_load_n(&worker->stop, __ATOMIC_ACQUIRE);
}

void worker_notify(struct tundp_worker *worker)
{
	if (worker->notify_fd < 0)
		return;
	worker->counters.syscalls++;
	(void)eventfd_write(worker->notify_fd, 1);
}

void worker_drain_control(struct tundp_worker *worker)
{
	eventfd_t value;

	beat(worker);
	worker->counters.syscalls++;
	(void)eventfd_read(worker->control_fd, &value);
}

static_assert(sizeof(struct tundp_hop) == 8, "lease/fib.py's HOP_DTYPE");
void tundp_worker_init(struct tundp_worker *worker)
{
	memset(worker, 0, sizeof(*worker));
	worker->tun_fd = -1;
	worker->udp_fd = -1;
	worker->control_fd = -1;
	worker->notify_fd = -1;
	worker->directions = TUNDP_ENCAP | TUNDP_DECAP;
	worker->max_segments = 1;
	worker->max_udp_segments = 1;
	worker->icmp_credit_ns = NS_PER_S / TUNDP_ICMP_RATE_PER_S * TUNDP_ICMP_BURST;
}

void tundp_worker_install(struct tundp_worker *worker, const struct tundp_fib *fib)
{
	__atomic_store_n(&worker->fib, fib, __ATOMIC_RELEASE);
	(void)eventfd_write(worker->control_fd, 1);
}

void tundp_worker_stop(struct tundp_worker *worker)
{
	__atomic_store_n(&worker->stop, 1, __ATOMIC_RELEASE);
	(void)eventfd_write(worker->control_fd, 1);
}

uint32_t tundp_worker_lost(const struct tundp_worker *worker)
{
	return __atomic_load_n(&worker->offloads_lost, __ATOMIC_RELAXED);
}

void tundp_worker_restore(struct tundp_worker *worker)
{
	__atomic_store_n(&worker->offloads_lost, 0, __ATOMIC_RELAXED);
}

uint64_t tundp_worker_seen(const struct tundp_worker *worker)
{
	return __atomic_load_n(&worker->seen, __ATOMIC_ACQUIRE);
}

uint64_t tundp_worker_beat(struct tundp_worker *worker)
{
	(void)eventfd_write(worker->control_fd, 1);
	return __atomic_load_n(&worker->beats, __ATOMIC_RELAXED);
}
