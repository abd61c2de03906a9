/* UDP to TUN in batches: every datagram of a receive, and every packet of a GRO'd one, gets its
 * verdict; what is delivered goes through the coalescer to the TUN. */
#include "batch.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/udp.h>

/* linux/udp.h; absent from some libc headers. */
#ifndef UDP_GRO
#define UDP_GRO 104
#endif

static void write_single(struct tundp_batch *batch, uint8_t *packet, size_t len,
			 const struct tally *tally)
{
	struct tundp_worker *worker = batch->worker;
	struct tundp_direction *direction = &worker->counters.decap;
	const size_t vnet_len =
		worker->offloads & TUNDP_OFFLOAD_VNET_HEADER ? TUNDP_VNET_LEN : 0;
	int error;

	memset(packet - vnet_len, 0, vnet_len);
	error = worker_write_tun(worker, packet - vnet_len, vnet_len + len);
	if (!error) {
		worker_count_out(worker, direction, tally);
		return;
	}
	if (error == EBADFD)
		batch->tun_error = EBADFD;
	worker_count_drop(worker, direction, tally, worker_tun_reason(worker, error));
}

/* The kernel does not take this kind of super-packet: the same packets go singly, now and
 * later. */
static void write_again_singly(struct tundp_batch *batch, const struct coalesced *refused)
{
	struct tundp_worker *worker = batch->worker;
	/* Not the arena: runs may wait in it. One of several packets is never 64 KiB long. */
	uint8_t *packet = worker->fragment_buffer + HEADROOM;
	uint64_t bytes_in = refused->bytes_in;
	uint32_t reason;

	worker->counters.offload_fallbacks++;
	batch_lose(batch, refused->vnet.gso_type == TUNDP_VNET_UDP_L4 ?
				  TUNDP_OFFLOAD_UDP_COALESCE :
				  TUNDP_OFFLOAD_TCP_COALESCE);
	if (!segment_begin(&batch->segmenter, batch->sums, &refused->vnet, refused->packet,
			   refused->len, &reason))
		return;
	for (uint32_t left = refused->count; left > 0; left--) {
		const size_t len = segment_next(&batch->segmenter, packet);
		struct tally tally = { .packets = 1, .bytes_in = len, .bytes_out = len };

		/* Bytes cut off behind a packet's end are the last one's. */
		if (left == 1)
			tally.bytes_in = bytes_in;
		bytes_in -= tally.bytes_in;
		write_single(batch, packet, len, &tally);
	}
}

static void write_coalesced(void *context, const struct coalesced *coalesced)
{
	struct tundp_batch *batch = context;
	struct tundp_worker *worker = batch->worker;
	const struct tally tally = {
		.packets = coalesced->count,
		.bytes_in = coalesced->bytes_in,
		/* What the packets came with, each with its headers. */
		.bytes_out = coalesced->len + (uint64_t)(coalesced->count - 1) *
						      coalesced->vnet.hdr_len,
	};
	int error;

	if (coalesced->count == 1) {
		write_single(batch, coalesced->packet, coalesced->len, &tally);
		return;
	}
	memcpy(coalesced->packet - TUNDP_VNET_LEN, &coalesced->vnet, TUNDP_VNET_LEN);
	error = worker_write_tun(worker, coalesced->packet - TUNDP_VNET_LEN,
				 TUNDP_VNET_LEN + coalesced->len);
	if (!error) {
		worker_count_out(worker, &worker->counters.decap, &tally);
		return;
	}
	if (error == EINVAL) {
		(void)worker_tun_reason(worker, error);
		write_again_singly(batch, coalesced);
		return;
	}
	if (error == EBADFD)
		batch->tun_error = EBADFD;
	worker_count_drop(worker, &worker->counters.decap, &tally,
			  worker_tun_reason(worker, error));
}

void batch_decap_init(struct tundp_batch *batch)
{
	struct coalescer *coalescer = &batch->coalescer;

	*coalescer = (struct coalescer){
		.sums = batch->sums,
		.write = write_coalesced,
		.context = batch,
		.misses = batch->worker->counters.coalesce_misses,
		.max_udp_segments = batch->worker->max_udp_segments,
	};
	for (uint32_t i = 0; i < COALESCE_BUFFERS; i++)
		coalescer->items[i].buffer = batch->item_buffers[i];
	for (uint32_t i = 0; i < RECEIVE_SLOTS; i++) {
		struct msghdr *message = &batch->receive_messages[i].msg_hdr;

		batch->receive_iovecs[i].iov_base = batch->receive_buffers[i] + HEADROOM;
		batch->receive_iovecs[i].iov_len = RECEIVE_BUFFER_LEN - HEADROOM;
		message->msg_iov = &batch->receive_iovecs[i];
		message->msg_iovlen = 1;
		message->msg_name = &batch->receive_from[i];
		message->msg_control = &batch->receive_control[i];
		message->msg_namelen = sizeof(batch->receive_from[i]);
		message->msg_controllen = sizeof(batch->receive_control[i]);
	}
}

/* What the kernel says of a receive: the size of the datagrams it put together, or `len`. */
static size_t read_control(struct tundp_batch *batch, struct msghdr *message, size_t len)
{
	size_t segment_len = len;

	for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR(message, c)) {
		int size;

		worker_count_overflows(batch->worker, c);
		if (c->cmsg_level != IPPROTO_UDP || c->cmsg_type != UDP_GRO)
			continue;
		memcpy(&size, CMSG_DATA(c), sizeof(size));
		if (size > 0 && (size_t)size < len)
			segment_len = (size_t)size;
	}
	return segment_len;
}

static void take(struct tundp_batch *batch, uint8_t *datagram, size_t len, uint32_t outer_source)
{
	struct tundp_worker *worker = batch->worker;
	struct tundp_verdict *verdict = &worker->verdict;
	const struct tally tally = { .packets = 1, .bytes_in = len };

	tundp_decapsulate(batch->fib, &worker->rules, datagram, len, outer_source, verdict);
	if (verdict->kind == TUNDP_DELIVER) {
		worker_count_mismatches(worker, verdict);
		coalesce_add(&batch->coalescer, datagram, verdict->len, len);
		return;
	}
	worker_count_drop(worker, &worker->counters.decap, &tally, verdict->reason);
	if (verdict->kind == TUNDP_REPLY)
		worker_reply_to_peer(worker, batch->fib);
}

bool batch_decap_turn(struct tundp_batch *batch)
{
	struct tundp_worker *worker = batch->worker;
	const uint32_t slots = worker->offloads & TUNDP_OFFLOAD_UDP_GRO ? SUPER_RECEIVE_SLOTS :
									  RECEIVE_SLOTS;
	int count = recvmmsg(worker->udp_fd, batch->receive_messages, slots, MSG_DONTWAIT, NULL);

	worker->counters.syscalls++;
	if (count < 0) {
		/* An ICMP error for an earlier datagram may be delivered here: that send is
		 * history, and what is behind it, epoll will say. */
		return errno == EINTR;
	}
	batch->coalescer.is_tcp_on = batch_has(batch, TUNDP_OFFLOAD_TCP_COALESCE);
	batch->coalescer.is_udp_on = batch_has(batch, TUNDP_OFFLOAD_UDP_COALESCE);
	for (int i = 0; i < count; i++) {
		struct msghdr *message = &batch->receive_messages[i].msg_hdr;
		const size_t len = batch->receive_messages[i].msg_len;
		const size_t segment_len = read_control(batch, message, len);
		const uint32_t from = ntohl(batch->receive_from[i].sin_addr.s_addr);
		uint8_t *datagram = batch->receive_buffers[i] + HEADROOM;
		size_t left = len;

		message->msg_namelen = sizeof(batch->receive_from[i]);
		message->msg_controllen = sizeof(batch->receive_control[i]);
		worker_count_read(&worker->counters.decap, len > segment_len ? 2 : 1);
		do {
			const size_t piece = left < segment_len ? left : segment_len;

			take(batch, datagram, piece, from);
			datagram += piece;
			left -= piece;
		} while (left);
	}
	coalesce_flush(&batch->coalescer);
	return (uint32_t)count == slots;
}
