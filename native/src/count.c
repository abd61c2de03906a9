/* Counting, under a sequence lock so that a reader sees whole packets; errno to drop reason. */
#include <errno.h>
#include <string.h>
#include <sys/socket.h>

#include "worker.h"

static void count_errno(struct tundp_worker *worker, int error)
{
	if (error <= 0 || error >= TUNDP_ERRNO_COUNT)
		error = TUNDP_ERRNO_COUNT - 1;
	worker->counters.errnos[error]++;
}

uint32_t worker_send_reason(struct tundp_worker *worker, int error)
{
	count_errno(worker, error);
	switch (error) {
#define REASON(number, reason)                                                           \
	case number:                                                                     \
		return reason;
		TUNDP_SEND_REASONS(REASON)
	default:
		return TUNDP_DROP_SEND_FAILED;
	}
}

uint32_t worker_tun_reason(struct tundp_worker *worker, int error)
{
	count_errno(worker, error);
	switch (error) {
		TUNDP_TUN_REASONS(REASON)
#undef REASON
	default:
		return TUNDP_DROP_TUN_FAILED;
	}
}

static void begin(struct tundp_worker *worker)
{
	__atomic_store_n(&worker->sequence, worker->sequence + 1, __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_RELEASE);
}

static void end(struct tundp_worker *worker)
{
	__atomic_store_n(&worker->sequence, worker->sequence + 1, __ATOMIC_RELEASE);
}

void worker_count_read(struct tundp_direction *direction, uint64_t packets)
{
	direction->reads++;
	direction->super_in += packets > 1;
}

void worker_count_out(struct tundp_worker *worker, struct tundp_direction *direction,
		      const struct tally *tally)
{
	begin(worker);
	direction->packets_in += tally->packets;
	direction->bytes_in += tally->bytes_in;
	direction->packets_out += tally->packets;
	direction->bytes_out += tally->bytes_out;
	direction->writes++;
	direction->super_out += tally->packets > 1;
	end(worker);
}

void worker_count_drop(struct tundp_worker *worker, struct tundp_direction *direction,
		       const struct tally *tally, uint32_t reason)
{
	begin(worker);
	direction->packets_in += tally->packets;
	direction->bytes_in += tally->bytes_in;
	direction->drops[reason] += tally->packets;
	end(worker);
}

void worker_count_overflows(struct tundp_worker *worker, const struct cmsghdr *control)
{
	uint32_t drops;

	if (control->cmsg_level != SOL_SOCKET || control->cmsg_type != SO_RXQ_OVFL)
		return;
	memcpy(&drops, CMSG_DATA(control), sizeof(drops));
	worker->counters.socket_overflows = worker->overflows_before + drops;
}

void tundp_worker_counters(const struct tundp_worker *worker, struct tundp_counters *counters)
{
	/* A sequence lock, held for a few additions at a time: this ends at once. */
	for (;;) {
		uint64_t before = __atomic_load_n(&worker->sequence, __ATOMIC_ACQUIRE);

		memcpy(counters, &worker->counters, sizeof(*counters));
		__atomic_thread_fence(__ATOMIC_ACQUIRE);
		if (!(before & 1) &&
		    before == __atomic_load_n(&worker->sequence, __ATOMIC_RELAXED))
			return;
	}
}
