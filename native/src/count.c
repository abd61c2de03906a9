/* Counting, under a sequence lock so that a reader sees whole packets; errno to drop reason. Per
 * hop there is no lock: a reader sees each number by itself. */
#include "count.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#include "clock.h"
#include "probes.h"
#include "tap.h"

static_assert(sizeof(struct tundp_hop_counters) == 64, "one cache line a hop");

static void begin(struct tundp_worker *worker)
{
	uint64_t *sequence = &worker->shared.sequence;

	__atomic_store_n(sequence, *sequence + 1, __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_RELEASE);
}

static void end(struct tundp_worker *worker)
{
	uint64_t *sequence = &worker->shared.sequence;

	__atomic_store_n(sequence, *sequence + 1, __ATOMIC_RELEASE);
}

/* There is one writer, so it needs no locked addition. */
static void add(uint64_t *counter, uint64_t number)
{
	__atomic_store_n(counter, *counter + number, __ATOMIC_RELAXED);
}

static void count_errno(struct tundp_worker *worker, int error)
{
	if (error <= 0 || error >= TUNDP_ERRNO_COUNT)
		error = TUNDP_ERRNO_COUNT - 1;
	worker->counters.errnos[error]++;
}

uint32_t count_send_refusal(struct tundp_worker *worker, const struct subject *subject)
{
	struct tundp_hop_counters *hop = &worker->config.hop_counters[subject->hop];

	count_errno(worker, subject->error);
	__atomic_store_n(&hop->last_errno, (uint32_t)subject->error, __ATOMIC_RELAXED);
	__atomic_store_n(&hop->last_refused_ns, clock_coarse_ns(), __ATOMIC_RELAXED);
	switch (subject->error) {
#define REASON(number, reason)                                                                     \
	case number:                                                                               \
		return reason;
		TUNDP_SEND_REASONS(REASON)
	default:
		return TUNDP_DROP_SEND_FAILED;
	}
}

uint32_t count_tun_refusal(struct tundp_worker *worker, const struct subject *subject)
{
	count_errno(worker, subject->error);
	switch (subject->error) {
		TUNDP_TUN_REASONS(REASON)
#undef REASON
	default:
		return TUNDP_DROP_TUN_FAILED;
	}
}

void count_read(struct tundp_worker *worker, struct tundp_direction *direction, uint64_t packets,
		struct subject *subject)
{
	const bool is_encap = direction == &worker->counters.encap;

	direction->reads++;
	direction->super_in += packets > 1;
	subject->packet_id = direction->reads;
	if (is_encap)
		PROBE_1(tun_read, packets);
	else
		PROBE_1(udp_receive, packets);
	if (worker->taps)
		tap_passed(worker, is_encap ? TUNDP_STAGE_TUN_READ : TUNDP_STAGE_UDP_RECEIVE, packets,
			   subject);
}

static void count_out(struct tundp_worker *worker, struct tundp_direction *direction,
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

void count_sent(struct tundp_worker *worker, const struct tally *tally,
		const struct subject *subject)
{
	struct tundp_hop_counters *hop = &worker->config.hop_counters[subject->hop];

	count_out(worker, &worker->counters.encap, tally);
	add(&hop->packets_out, tally->packets);
	add(&hop->bytes_out, tally->bytes_out);
	PROBE_1(udp_send, tally->packets);
	if (worker->taps)
		tap_passed(worker, TUNDP_STAGE_UDP_SEND, tally->packets, subject);
}

void count_delivered(struct tundp_worker *worker, const struct tally *tally,
		     const struct subject *subject)
{
	count_out(worker, &worker->counters.decap, tally);
	PROBE_1(tun_write, tally->packets);
	if (worker->taps)
		tap_passed(worker, TUNDP_STAGE_TUN_WRITE, tally->packets, subject);
}

void count_dropped(struct tundp_worker *worker, struct tundp_direction *direction,
		   const struct tally *tally, uint32_t reason, const struct subject *subject)
{
	begin(worker);
	direction->packets_in += tally->packets;
	direction->bytes_in += tally->bytes_in;
	direction->drops[reason] += tally->packets;
	end(worker);
	add(&worker->config.hop_counters[subject->hop].drops, tally->packets);
	if (reason == TUNDP_DROP_HOP_QUEUE_FULL)
		add(&worker->config.hop_queues[subject->hop].full, tally->packets);
	PROBE_5(drop, direction != &worker->counters.encap, reason, subject->hop, subject->len,
		tally->packets);
	tap_dropped(worker, direction == &worker->counters.encap, tally->packets, reason, subject);
}

void count_heard(struct tundp_worker *worker, uint64_t packets, const struct subject *subject,
		 uint64_t now_ns)
{
	struct tundp_hop_counters *hop = &worker->config.hop_counters[subject->hop];

	add(&hop->packets_in, packets);
	add(&hop->bytes_in, subject->len);
	__atomic_store_n(&hop->last_heard_ns, now_ns, __ATOMIC_RELAXED);
}

void count_overflows(struct tundp_worker *worker, const struct cmsghdr *control)
{
	uint32_t drops;

	if (control->cmsg_level != SOL_SOCKET || control->cmsg_type != SO_RXQ_OVFL)
		return;
	memcpy(&drops, CMSG_DATA(control), sizeof(drops));
	worker->counters.socket_overflows += (uint32_t)(drops - worker->shared.overflows);
	worker->shared.overflows = drops;
}

int tundp_has_probes(void)
{
	return PROBES_ARE_THERE;
}

void tundp_worker_counters(const struct tundp_worker *worker, struct tundp_counters *counters)
{
	const uint64_t *sequence = &worker->shared.sequence;

	/* A sequence lock, held for a few additions at a time: this ends at once. */
	for (;;) {
		uint64_t before = __atomic_load_n(sequence, __ATOMIC_ACQUIRE);

		memcpy(counters, &worker->counters, sizeof(*counters));
		__atomic_thread_fence(__ATOMIC_ACQUIRE);
		if (!(before & 1) && before == __atomic_load_n(sequence, __ATOMIC_RELAXED))
			return;
	}
}
