/* TUN to UDP in batches: every read is taken apart into the arena, packet behind packet, where
 * neighbours of equal size for one peer become trains (train.c).
 *
 * Order is kept. A full train leaves at once; the rest waits for nothing but the end of what the
 * TUN has now. A read that finds no room in the arena stays in `reading` until there is. */
#include "batch.h"

#include <errno.h>
#include <unistd.h>

#include "train.h"

void batch_encap_init(struct batch *batch)
{
	batch->reading.left = 0;
	train_init(batch);
}

/* Counts what is left of a read as dropped. */
static void drop_reading(struct batch *batch, uint64_t bytes_in, uint32_t reason,
			 const struct subject *subject)
{
	struct tundp_worker *worker = batch->worker;
	const struct tally tally = { .packets = batch->reading.left, .bytes_in = bytes_in };

	batch->reading.left = 0;
	count_dropped(worker, &worker->counters.encap, &tally, reason, subject);
}

/* Decides a read by its first packet, which was just written to `packet`: addresses, TTL and
 * flags are the same in each, so they have one fate. `len` bytes are to be counted if it is not
 * to be forwarded. Returns the packet's length, 0 if the read is done with. */
static uint32_t decide(struct batch *batch, uint8_t *packet, size_t made, uint64_t len)
{
	struct tundp_worker *worker = batch->worker;
	struct reading *reading = &batch->reading;
	struct tundp_verdict verdict;

	tundp_encapsulate(batch->fib, &worker->config.policy, packet, made, &verdict);
	if (verdict.kind != TUNDP_FORWARD) {
		const struct subject subject = { .packet = packet,
						 .len = made,
						 .hop = verdict.hop };

		drop_reading(batch, len, verdict.reason, &subject);
		if (verdict.kind == TUNDP_REPLY)
			single_reply_to_tun(worker, &verdict);
		return 0;
	}
	reading->is_decided = true;
	reading->fragment_mtu = verdict.fragment_mtu;
	reading->to.hop = verdict.hop;
	reading->to.endpoint = batch->fib->hops[verdict.hop];
	segment_lower_ttl(&reading->segmenter);
	return verdict.len;
}

/* Inner bytes of the packets of a read that are still to come. */
static uint64_t bytes_left(const struct reading *reading)
{
	return reading->segmenter.payload_len +
	       (uint64_t)reading->left *
		       (reading->segmenter.gso_size ? reading->segmenter.header_len : 0);
}

/* Takes the read at hand apart into the arena, until it is done with or the socket is full. */
static void continue_reading(struct batch *batch)
{
	struct reading *reading = &batch->reading;
	struct segmenter *segmenter = &reading->segmenter;

	while (reading->left) {
		const size_t room =
			(segmenter->gso_size ? segmenter->gso_size : segmenter->payload_len) +
			TUNDP_HEADERS_MAX;
		const uint64_t len = bytes_left(reading);
		uint8_t *out = train_make_room(batch, room);
		uint32_t packet_len;
		size_t made;

		if (!out)
			return;
		made = segment_next(segmenter, out);
		packet_len = (uint32_t)made;
		if (!reading->is_decided) {
			packet_len = decide(batch, out, made, len);
			if (!packet_len)
				return;
		}
		train_append(batch, &reading->to, packet_len, reading->fragment_mtu, made);
		reading->left--;
	}
}

/* Takes up a read: `len` bytes at `packet`, behind `vnet`. */
static void begin_reading(struct batch *batch, const struct tundp_vnet *vnet, const uint8_t *packet,
			  size_t len)
{
	struct reading *reading = &batch->reading;
	const struct subject subject = { .packet = packet, .len = len };
	uint32_t reason;

	reading->is_decided = false;
	reading->left = 1;
	if (!segment_begin(&reading->segmenter, batch->sums, vnet, packet, len, &reason)) {
		count_read(&batch->worker->counters.encap, 1);
		drop_reading(batch, len, reason, &subject);
		return;
	}
	reading->left = reading->segmenter.count;
	count_read(&batch->worker->counters.encap, reading->left);
	continue_reading(batch);
}

void batch_encap_resume(struct batch *batch)
{
	batch->is_blocked = false;
	train_send_all(batch);
	if (!batch->is_blocked) {
		continue_reading(batch);
		train_send_all(batch);
	}
}

void batch_encap_abandon(struct batch *batch)
{
	const struct reading *reading = &batch->reading;
	const struct subject rest = { .packet = reading->segmenter.payload,
				      .len = reading->segmenter.payload_len,
				      .hop = reading->is_decided ? reading->to.hop : 0 };

	train_abandon_all(batch);
	if (reading->left)
		drop_reading(batch, bytes_left(reading), TUNDP_DROP_SEND_NO_BUFFER, &rest);
}

bool batch_encap_iteration(struct batch *batch)
{
	struct tundp_worker *worker = batch->worker;
	const size_t vnet_len =
		worker->config.offloads & TUNDP_OFFLOAD_VNET_HEADER ? TUNDP_VNET_LEN : 0;
	/* The packet, not the vnet header, is what begins aligned. */
	uint8_t *start = batch->read_buffer + HEADROOM - vnet_len;
	bool is_dry = false;

	for (int count = 0; count < READS_PER_ITERATION && !is_dry && !batch->is_blocked; count++) {
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
		if ((size_t)len < vnet_len) {
			const struct subject subject = { 0 };

			count_read(&worker->counters.encap, 1);
			batch->reading.left = 1;
			drop_reading(batch, 0, TUNDP_DROP_BAD_VNET_HEADER, &subject);
			continue;
		}
		memcpy(&vnet, start, vnet_len);
		begin_reading(batch, &vnet, start + vnet_len, (size_t)len - vnet_len);
		train_send_full(batch);
	}
	train_send_all(batch);
	return !is_dry;
}
