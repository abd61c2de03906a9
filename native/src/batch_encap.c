/* TUN to UDP in batches: every read is taken apart into the arena, packet behind packet, where
 * neighbours of equal size for one peer become trains (train.c).
 *
 * Order is kept. A full train leaves at once; the rest waits for nothing but the end of what the
 * TUN has now. */
#include "batch.h"

#include <errno.h>
#include <unistd.h>

#include "latency.h"
#include "publish.h"
#include "train.h"

void batch_encap_init(struct batch *batch)
{
	train_init(batch);
}

/* Counts what is left of a read as dropped. */
static void drop_reading(struct batch *batch, uint64_t bytes_in, uint32_t reason,
			 struct subject *subject)
{
	struct tundp_worker *worker = batch->worker;
	const struct tally tally = { .packets = batch->reading.left, .bytes_in = bytes_in };

	batch->reading.left = 0;
	subject->packet_id = batch->reading.packet_id;
	count_dropped(worker, &worker->counters.encap, &tally, reason, subject);
}

/* How many packets to a hop may leave in one send. */
static uint32_t train_len_max(const struct batch *batch, const struct tundp_verdict *verdict)
{
	const struct tundp_path *path = &batch->fib->paths[verdict->hop];

	if (verdict->fragment_mtu || !publish_has(batch->worker, TUNDP_OFFLOAD_UDP_SEGMENT) ||
	    __atomic_load_n(&path->no_gso, __ATOMIC_RELAXED))
		return 1;
	return batch->worker->config.max_segments;
}

/* Inner bytes of the packets of a read that are still to come. */
static uint64_t bytes_left(const struct reading *reading)
{
	const struct segmenter *segmenter = &reading->segmenter;
	const uint64_t header_len = segmenter->gso_size ? segmenter->header_len : 0;

	return segmenter->payload_len + reading->left * header_len;
}

/* Writes the first packet of a read to `out` and decides all of them by it: addresses, TTL and
 * flags are the same in each, so they have one fate. False if the read is done with. */
static bool decide(struct batch *batch, uint8_t *out)
{
	struct tundp_worker *worker = batch->worker;
	struct reading *reading = &batch->reading;
	const uint64_t bytes_in = bytes_left(reading);
	const size_t made = segment_next(&reading->segmenter, out);
	struct tundp_verdict verdict;

	tundp_encapsulate(batch->fib, &worker->config.policy, out, made, &verdict);
	if (verdict.kind != TUNDP_FORWARD) {
		struct subject subject = { .packet = out,
					   .len = made,
					   .gso_size = (uint16_t)reading->segmenter.gso_size };

		single_route(batch->fib, verdict.hop, &subject);
		drop_reading(batch, bytes_in, verdict.reason, &subject);
		if (verdict.kind == TUNDP_REPLY)
			single_reply_to_tun(worker, &verdict);
		return false;
	}
	reading->is_decided = true;
	reading->lane.to = hop_destination(batch->fib, verdict.hop);
	reading->lane.fragment_mtu = verdict.fragment_mtu;
	reading->lane.count_max = train_len_max(batch, &verdict);
	segment_lower_ttl(&reading->segmenter);
	train_append(batch, &reading->lane, verdict.len, made);
	return true;
}

/* Segments the current read into the arena. */
static void take_apart(struct batch *batch)
{
	struct reading *reading = &batch->reading;
	struct segmenter *segmenter = &reading->segmenter;
	const size_t piece_len = segmenter->gso_size ? segmenter->gso_size : segmenter->payload_len;

	for (; reading->left; reading->left--) {
		uint8_t *out = train_make_room(batch, piece_len + TUNDP_HEADERS_MAX);

		if (reading->is_decided) {
			const size_t made = segment_next(segmenter, out);

			train_append(batch, &reading->lane, (uint32_t)made, made);
		} else if (!decide(batch, out)) {
			return;
		}
	}
}

/* Begins a read: `len` bytes at `packet`, described by `vnet`. */
static void begin_reading(struct batch *batch, const struct tundp_vnet *vnet, const uint8_t *packet,
			  size_t len)
{
	struct reading *reading = &batch->reading;
	struct tundp_worker *worker = batch->worker;
	struct subject subject = { .packet = packet, .len = len };
	uint32_t reason;
	const bool is_whole =
		segment_begin(&reading->segmenter, batch->sums, vnet, packet, len, &reason);

	reading->is_decided = false;
	reading->left = is_whole ? reading->segmenter.count : 1;
	if (is_whole)
		subject.gso_size = (uint16_t)reading->segmenter.gso_size;
	count_read(worker, &worker->counters.encap, reading->left, &subject);
	reading->packet_id = subject.packet_id;
	if (is_whole)
		take_apart(batch);
	else
		drop_reading(batch, len, reason, &subject);
}

bool batch_encap_iteration(struct batch *batch)
{
	struct tundp_worker *worker = batch->worker;
	const size_t vnet_len =
		worker->config.offloads & TUNDP_OFFLOAD_VNET_HEADER ? TUNDP_VNET_LEN : 0;
	/* The packet, not the vnet header, is what begins aligned. */
	uint8_t *start = batch->read_buffer + HEADROOM - vnet_len;
	struct tundp_direction *direction = &worker->counters.encap;
	const uint64_t before = direction->packets_in;
	uint64_t began_ns = 0;
	bool has_begun = false, is_dry = false;

	for (int count = 0; count < READS_PER_ITERATION && !is_dry; count++) {
		struct tundp_vnet vnet = { 0 };
		ssize_t len =
			read(worker->config.tun_fd, start, READ_BUFFER_LEN - HEADROOM + vnet_len);

		worker->counters.syscalls++;
		if (len < 0) {
			if (errno == EBADFD)
				batch->tun_error = EBADFD;
			is_dry = errno != EINTR;
			continue;
		}
		if (!has_begun)
			began_ns = latency_begin(&worker->encap_batches);
		has_begun = true;
		if ((size_t)len < vnet_len) {
			struct subject subject = { 0 };

			count_read(worker, &worker->counters.encap, 1, &subject);
			batch->reading.packet_id = subject.packet_id;
			batch->reading.left = 1;
			drop_reading(batch, 0, TUNDP_DROP_BAD_VNET_HEADER, &subject);
			continue;
		}
		memcpy(&vnet, start, vnet_len);
		begin_reading(batch, &vnet, start + vnet_len, (size_t)len - vnet_len);
		train_send_full(batch);
	}
	train_send_all(batch);
	latency_end(direction, before, began_ns);
	return !is_dry;
}
