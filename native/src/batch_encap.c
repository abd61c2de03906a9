/* TUN to UDP in batches: every read is taken apart into the arena, packet behind packet, and
 * neighbours of equal size for one peer leave in one send (UDP_SEGMENT).
 *
 * Order is kept: runs are sent in the order their packets were read. A full run leaves at
 * once; the rest waits for nothing but the end of what the TUN has now. */
#include "batch.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/udp.h>
#include <unistd.h>

enum {
	NO_BUFFER_TRIES = 3,
	REFUSALS_MAX = 64, /* EAGAINs in a row of a socket that says it has room */
};

/* linux/udp.h; absent from some libc headers. */
#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif

void batch_encap_init(struct tundp_batch *batch)
{
	for (uint32_t i = 0; i < MAX_RUNS; i++) {
		struct msghdr *message = &batch->send_messages[i].msg_hdr;
		struct cmsghdr *control = &batch->send_control[i].align;

		batch->send_to[i].sin_family = AF_INET;
		message->msg_name = &batch->send_to[i];
		message->msg_namelen = sizeof(batch->send_to[i]);
		message->msg_iov = &batch->send_iovecs[i];
		message->msg_iovlen = 1;
		control->cmsg_level = IPPROTO_UDP;
		control->cmsg_type = UDP_SEGMENT;
		control->cmsg_len = CMSG_LEN(sizeof(uint16_t));
	}
}

static void prepare(struct tundp_batch *batch, uint32_t at)
{
	const struct run *run = &batch->runs[at];
	struct msghdr *message = &batch->send_messages[at].msg_hdr;
	const uint16_t segment_len = (uint16_t)run->segment_len;

	batch->send_to[at].sin_port = htons(run->to.port);
	batch->send_to[at].sin_addr.s_addr = htonl(run->to.address);
	batch->send_iovecs[at].iov_base = batch->send_arena + run->offset;
	batch->send_iovecs[at].iov_len = run->len;
	message->msg_control = NULL;
	message->msg_controllen = 0;
	if (run->count > 1) {
		message->msg_control = &batch->send_control[at];
		message->msg_controllen = sizeof(batch->send_control[at]);
		memcpy(CMSG_DATA(&batch->send_control[at].align), &segment_len,
		       sizeof(segment_len));
	}
}

/* The packets of a refused run, one by one, as if just read: with their TTL back, so that
 * each gets its own verdict (an EMSGSIZE has something to teach). */
static uint64_t send_singly(struct tundp_batch *batch, const struct run *run)
{
	const uint64_t before = batch->worker->counters.encap.packets_out;
	uint8_t *packet = batch->send_arena + run->offset;
	size_t left = run->len;

	while (left) {
		const size_t len = left < run->segment_len ? left : run->segment_len;

		packet[IP_OFF_TTL]++;
		ip_store_checksum(packet, (size_t)(packet[0] & 0x0f) * 4);
		worker_encapsulate(batch->worker, batch->fib, packet, len);
		packet += len;
		left -= len;
	}
	return batch->worker->counters.encap.packets_out - before;
}

static void drop_run(struct tundp_batch *batch, const struct run *run, int error)
{
	struct tundp_worker *worker = batch->worker;
	const struct tally tally = { .packets = run->count, .bytes_in = run->bytes_in };

	worker_count_drop(worker, &worker->counters.encap, &tally,
			  worker_send_reason(worker, error));
}

/* Takes up a refused run: true if it shall be sent again as it is, false if it is done with. */
static bool retry(struct tundp_batch *batch, const struct run *run, int error, int *tries)
{
	struct tundp_worker *worker = batch->worker;

	switch (error) {
	case EINTR:
		return true;
	case EAGAIN:
		/* Said so often by a socket with room, it is no lack of room. */
		if (++batch->refusals < REFUSALS_MAX) {
			batch->is_blocked = true;
			worker->counters.send_waits++;
			return true;
		}
		break;
	case ENOBUFS:
		if (--*tries > 0)
			return true;
		break;
	case EIO:
	case EINVAL:
		if (run->count == 1)
			break;
		/* The same packets go singly. If that works, this path has no UDP_SEGMENT, and
		 * later ones go singly at once; if not (a blackhole route), it was not that. */
		(void)worker_send_reason(worker, error);
		if (send_singly(batch, run)) {
			worker->counters.offload_fallbacks++;
			if (run->generation == batch->fib->generation)
				__atomic_store_n(&batch->fib->single[run->hop], 1,
						 __ATOMIC_RELAXED);
			worker_notify(worker);
		}
		return false;
	case EMSGSIZE:
		(void)worker_send_reason(worker, error);
		(void)send_singly(batch, run);
		return false;
	default:
		break;
	}
	drop_run(batch, run, error);
	return false;
}

/* Forgets the first `count` runs, which are done with. */
static void remove_runs(struct tundp_batch *batch, uint32_t count)
{
	batch->run_count -= count;
	memmove(batch->runs, batch->runs + count, batch->run_count * sizeof(batch->runs[0]));
	if (!batch->run_count)
		batch->arena_len = 0;
}

/* Sends the first `count` runs, or as many as the socket has room for; what is left stays. */
static void send_runs(struct tundp_batch *batch, uint32_t count)
{
	struct tundp_worker *worker = batch->worker;
	int tries = NO_BUFFER_TRIES;
	uint32_t at = 0;

	for (uint32_t i = 0; i < count; i++)
		prepare(batch, i);
	while (at < count && !batch->is_blocked) {
		int sent = sendmmsg(worker->udp_fd, &batch->send_messages[at], count - at,
				    MSG_DONTWAIT);
		const int error = errno;

		worker->counters.syscalls++;
		if (sent < 0) {
			if (!retry(batch, &batch->runs[at], error, &tries)) {
				at++;
				tries = NO_BUFFER_TRIES;
			}
			continue;
		}
		tries = NO_BUFFER_TRIES;
		batch->refusals = 0;
		for (; sent > 0; sent--, at++) {
			const struct run *run = &batch->runs[at];
			const struct tally tally = { .packets = run->count,
						     .bytes_in = run->bytes_in,
						     .bytes_out = run->len };

			worker_count_out(worker, &worker->counters.encap, &tally);
		}
	}
	remove_runs(batch, at);
}

static void send_all(struct tundp_batch *batch)
{
	if (batch->run_count && !batch->is_blocked)
		send_runs(batch, batch->run_count);
}

void batch_encap_resume(struct tundp_batch *batch)
{
	batch->is_blocked = false;
	send_all(batch);
}

void batch_encap_abandon(struct tundp_batch *batch)
{
	for (uint32_t i = 0; i < batch->run_count; i++)
		drop_run(batch, &batch->runs[i], ENOBUFS);
	remove_runs(batch, batch->run_count);
	batch->is_blocked = false;
}

/* Sends everything, now: in the middle of a read there is nowhere else to turn. */
static void send_all_waiting(struct tundp_batch *batch)
{
	send_all(batch);
	while (batch->is_blocked) {
		if (worker_wait_writable(batch->worker))
			batch_encap_resume(batch);
		else
			batch_encap_abandon(batch);
	}
}

/* A place for one more packet of up to `len` bytes. */
static uint8_t *make_room(struct tundp_batch *batch, size_t len)
{
	if (batch->run_count == MAX_RUNS || SEND_ARENA_LEN - batch->arena_len < len)
		send_all_waiting(batch);
	return batch->send_arena + batch->arena_len;
}

/* The packet just written behind the arena's end joins the last run or begins a new one. */
static void append(struct tundp_batch *batch, uint32_t hop, uint32_t len, uint64_t bytes_in)
{
	const struct tundp_worker *worker = batch->worker;
	struct run *run = batch->run_count ? &batch->runs[batch->run_count - 1] : NULL;

	if (run && !run->is_closed && run->hop == hop &&
	    run->generation == batch->fib->generation && len <= run->segment_len) {
		run->len += len;
		run->count++;
		run->bytes_in += bytes_in;
	} else {
		run = &batch->runs[batch->run_count++];
		*run = (struct run){ .to = batch->fib->hops[hop],
				     .hop = hop,
				     .generation = batch->fib->generation,
				     .offset = batch->arena_len,
				     .len = len,
				     .segment_len = len,
				     .count = 1,
				     .bytes_in = bytes_in };
	}
	batch->arena_len += len;
	run->is_closed = len < run->segment_len || run->len + run->segment_len > TUNDP_MAX_DATAGRAM_LEN ||
			 run->count >= worker->max_segments ||
			 !batch_has(batch, TUNDP_OFFLOAD_UDP_SEGMENT) ||
			 __atomic_load_n(&batch->fib->single[hop], __ATOMIC_RELAXED);
}

/* Packets that leave in fragments, or whose read was no good: the slow way, in order. */
static void encapsulate_singly(struct tundp_batch *batch, const struct tundp_vnet *vnet,
			       const uint8_t *packet, size_t len)
{
	struct tundp_worker *worker = batch->worker;
	uint32_t reason;

	send_all_waiting(batch);
	if (!segment_begin(&batch->segmenter, batch->sums, vnet, packet, len, &reason))
		return;
	for (uint32_t left = batch->segmenter.count; left > 0; left--) {
		const size_t made = segment_next(&batch->segmenter, worker->tun_buffer);

		worker_encapsulate(worker, batch->fib, worker->tun_buffer, made);
	}
}

/* Takes one read, all its packets, into the arena. They have one fate: addresses, TTL and
 * flags are the same in each, so the first one's verdict is everybody's. */
static void take(struct tundp_batch *batch, const struct tundp_vnet *vnet, const uint8_t *packet,
		 size_t len)
{
	struct tundp_worker *worker = batch->worker;
	struct tundp_verdict *verdict = &worker->verdict;
	struct segmenter *segmenter = &batch->segmenter;
	struct tally tally = { .packets = 1, .bytes_in = len };
	uint32_t reason, hop;
	uint8_t *out;
	size_t made, room;

	if (!segment_begin(segmenter, batch->sums, vnet, packet, len, &reason)) {
		worker_count_read(&worker->counters.encap, 1);
		worker_count_drop(worker, &worker->counters.encap, &tally, reason);
		return;
	}
	room = (segmenter->gso_size ? segmenter->gso_size : len) + TUNDP_HEADERS_MAX;
	worker_count_read(&worker->counters.encap, segmenter->count);
	out = make_room(batch, room);
	made = segment_next(segmenter, out);
	tundp_encapsulate(batch->fib, &worker->rules, out, made, verdict);
	if (verdict->kind != TUNDP_FORWARD) {
		tally.packets = segmenter->count;
		tally.bytes_in += (uint64_t)(segmenter->count - 1) * segmenter->header_len;
		worker_count_drop(worker, &worker->counters.encap, &tally, verdict->reason);
		if (verdict->kind == TUNDP_REPLY)
			worker_reply_to_tun(worker);
		return;
	}
	if (verdict->fragment_mtu) {
		encapsulate_singly(batch, vnet, packet, len);
		return;
	}
	hop = verdict->hop;
	append(batch, hop, verdict->len, made);
	segment_lower_ttl(segmenter);
	for (uint32_t left = segmenter->count - 1; left > 0; left--) {
		out = make_room(batch, room);
		made = segment_next(segmenter, out);
		append(batch, hop, (uint32_t)made, made);
	}
}

/* Full runs have nothing to wait for. */
static void send_full(struct tundp_batch *batch)
{
	const uint32_t count = batch->run_count;
	const struct run *last;

	if (count == 0 || batch->is_blocked)
		return;
	last = &batch->runs[count - 1];
	if (last->is_closed && (last->count > 1 || count == MAX_RUNS)) {
		send_all(batch);
	} else if (count > 1 && batch->runs[count - 2].count > 1) {
		const uint32_t len = last->len;

		send_runs(batch, count - 1);
		/* The open one moves to the front: the arena's first bytes are in the cache. */
		if (batch->run_count == 1 && batch->runs[0].offset >= len) {
			memcpy(batch->send_arena, batch->send_arena + batch->runs[0].offset, len);
			batch->runs[0].offset = 0;
			batch->arena_len = len;
		}
	}
}

bool batch_encap_turn(struct tundp_batch *batch)
{
	struct tundp_worker *worker = batch->worker;
	const size_t vnet_len =
		worker->offloads & TUNDP_OFFLOAD_VNET_HEADER ? TUNDP_VNET_LEN : 0;
	/* The packet, not the vnet header, is what begins aligned. */
	uint8_t *start = batch->read_buffer + HEADROOM - vnet_len;
	bool is_dry = false;

	for (int count = 0; count < READS_PER_TURN && !is_dry && !batch->is_blocked; count++) {
		struct tundp_vnet vnet = { 0 };
		ssize_t len = read(worker->tun_fd, start, READ_BUFFER_LEN - HEADROOM + vnet_len);

		worker->counters.syscalls++;
		if (len < 0) {
			if (errno == EBADFD)
				batch->tun_error = EBADFD;
			is_dry = errno != EINTR;
			continue;
		}
		if ((size_t)len < vnet_len)
			continue;
		memcpy(&vnet, start, vnet_len);
		take(batch, &vnet, start + vnet_len, (size_t)len - vnet_len);
		send_full(batch);
	}
	send_all(batch);
	return !is_dry;
}
