/* UDP to TUN in batches: every datagram of a receive, and every packet of a GRO'd one, gets its
 * verdict; what is delivered goes through the coalescer to the TUN. */
#include "batch.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/udp.h>

#include "clock.h"
#include "fib.h"
#include "latency.h"
#include "publish.h"

/* linux/udp.h; absent from some libc headers. */
#ifndef UDP_GRO
#define UDP_GRO 104
#endif

static struct subject subject_of(const struct coalesced *coalesced, int error)
{
	return (struct subject){ .packet = coalesced->packet,
				 .len = coalesced->len,
				 .outer = coalesced->origin.outer,
				 .port = coalesced->origin.port,
				 .gso_size = coalesced->vnet.gso_size,
				 .hop = coalesced->origin.hop,
				 .error = error,
				 .packet_id = coalesced->origin.packet_id,
				 .more_ids = (uint32_t)(coalesced->last_id -
							coalesced->origin.packet_id) };
}

static void drop(struct batch *batch, const struct tally *tally, uint32_t reason,
		 const struct subject *subject)
{
	if (subject->error == EBADFD)
		batch->tun_error = EBADFD;
	count_dropped(batch->worker, &batch->worker->counters.decap, tally, reason, subject);
}

/* Writes one packet of `subject->len` bytes, with HEADROOM before it that may be written. */
static void write_single(struct batch *batch, uint8_t *packet, const struct tally *tally,
			 struct subject *subject)
{
	struct tundp_worker *worker = batch->worker;
	const size_t vnet_len =
		worker->config.offloads & TUNDP_OFFLOAD_VNET_HEADER ? TUNDP_VNET_LEN : 0;

	memset(packet - vnet_len, 0, vnet_len);
	subject->packet = packet;
	subject->error = single_write_tun(worker, packet - vnet_len, vnet_len + subject->len);
	if (subject->error)
		drop(batch, tally, count_tun_refusal(worker, subject), subject);
	else
		count_delivered(worker, tally, subject);
}

/* The kernel refused a super-packet: write its packets one by one, and disable this kind of
 * coalescing. */
static void write_again_singly(struct batch *batch, const struct coalesced *refused)
{
	struct tundp_worker *worker = batch->worker;
	/* Not in the arena, where trains may wait. One of several packets is always below 64 KiB. */
	uint8_t *packet = worker->piece + HEADROOM;
	struct tally tally = { .packets = refused->count, .bytes_in = refused->bytes_in };
	struct subject subject = subject_of(refused, EINVAL);
	uint64_t bytes_in = refused->bytes_in;
	struct segmenter segmenter;
	uint32_t reason;

	worker->counters.offload_fallbacks++;
	publish_disable(worker, refused->vnet.gso_type == TUNDP_VNET_UDP_L4 ?
					TUNDP_OFFLOAD_UDP_COALESCE :
					TUNDP_OFFLOAD_TCP_COALESCE);
	if (!segment_begin(&segmenter, batch->sums, &refused->vnet, refused->packet, refused->len,
			   &reason)) {
		drop(batch, &tally, TUNDP_DROP_TUN_REJECTED, &subject);
		return;
	}
	subject.gso_size = 0;
	for (uint32_t left = refused->count; left > 0; left--) {
		subject.len = segment_next(&segmenter, packet);
		tally = (struct tally){ .packets = 1,
					.bytes_in = subject.len,
					.bytes_out = subject.len };
		/* Bytes cut off behind a packet's end are the last one's. */
		if (left == 1)
			tally.bytes_in = bytes_in;
		bytes_in -= tally.bytes_in;
		write_single(batch, packet, &tally, &subject);
	}
}

static void write_coalesced(void *context, const struct coalesced *coalesced)
{
	struct batch *batch = context;
	struct tundp_worker *worker = batch->worker;
	struct subject subject = subject_of(coalesced, 0);
	const struct tally tally = {
		.packets = coalesced->count,
		.bytes_in = coalesced->bytes_in,
		/* What the packets came with, each with its headers. */
		.bytes_out =
			coalesced->len + (uint64_t)(coalesced->count - 1) * coalesced->vnet.hdr_len,
	};
	uint32_t reason;

	if (coalesced->count == 1) {
		write_single(batch, coalesced->packet, &tally, &subject);
		return;
	}
	memcpy(coalesced->packet - TUNDP_VNET_LEN, &coalesced->vnet, TUNDP_VNET_LEN);
	subject.error = single_write_tun(worker, coalesced->packet - TUNDP_VNET_LEN,
					 TUNDP_VNET_LEN + coalesced->len);
	if (!subject.error) {
		count_delivered(worker, &tally, &subject);
		return;
	}
	reason = count_tun_refusal(worker, &subject);
	if (subject.error == EINVAL)
		write_again_singly(batch, coalesced);
	else
		drop(batch, &tally, reason, &subject);
}

void batch_decap_init(struct batch *batch)
{
	struct coalescer *coalescer = &batch->coalescer;

	batch->heard_generation = 0;
	batch->heard = (struct origin){ 0 };
	*coalescer = (struct coalescer){
		.sums = batch->sums,
		.write = write_coalesced,
		.context = batch,
		.misses = batch->worker->counters.coalesce_misses,
		.max_udp_segments = batch->worker->config.max_udp_segments,
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

/* The size of the datagrams the kernel put together in a receive (UDP_GRO), or `len`. The stamp of
 * several is that of the first. */
static size_t read_control(struct batch *batch, struct msghdr *message, size_t len,
			   uint32_t *wait_ns)
{
	size_t segment_len = len;

	for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR(message, c)) {
		int size;

		count_overflows(batch->worker, c);
		*wait_ns = socket_wait_of(batch->worker, c, *wait_ns);
		if (c->cmsg_level != IPPROTO_UDP || c->cmsg_type != UDP_GRO)
			continue;
		memcpy(&size, CMSG_DATA(c), sizeof(size));
		if (size > 0 && (size_t)size < len)
			segment_len = (size_t)size;
	}
	return segment_len;
}

/* Decides one datagram; a delivered one goes into the coalescer. */
static void receive_one(struct batch *batch, uint8_t *datagram, const struct subject *subject)
{
	struct tundp_worker *worker = batch->worker;
	const struct tally tally = { .packets = 1, .bytes_in = subject->len };
	struct tundp_verdict verdict;

	tundp_decapsulate(batch->fib, &worker->config.policy, datagram, subject->len,
			  subject->outer, subject->port, &verdict);
	if (verdict.kind == TUNDP_DELIVER) {
		count_mismatches(worker, &verdict, subject);
		single_hand_over(worker, datagram, &verdict);
		coalesce_add(&batch->coalescer, datagram, verdict.len, subject->len);
		return;
	}
	drop(batch, &tally, verdict.reason, subject);
	if (verdict.kind == TUNDP_REPLY)
		single_reply_to_peer(worker, batch->fib, &verdict, subject);
}

/* The hop a message came from. Cached: consecutive messages mostly have one sender. */
static struct origin find_origin(struct batch *batch, uint32_t outer)
{
	if (batch->heard.outer != outer || batch->heard_generation != batch->fib->generation) {
		batch->heard.outer = outer;
		batch->heard.hop = fib_hop_of_peer(batch->fib, outer);
		batch->heard_generation = batch->fib->generation;
	}
	return batch->heard;
}

/* One message of a receive: a datagram, or several the kernel put together. */
static void receive_message(struct batch *batch, uint32_t number, uint64_t now_ns)
{
	struct tundp_worker *worker = batch->worker;
	struct msghdr *message = &batch->receive_messages[number].msg_hdr;
	const size_t len = batch->receive_messages[number].msg_len;
	uint32_t wait_ns = 0;
	const size_t segment_len = read_control(batch, message, len, &wait_ns);
	struct origin origin =
		find_origin(batch, ntohl(batch->receive_from[number].sin_addr.s_addr));
	uint8_t *datagram = batch->receive_buffers[number] + HEADROOM;
	struct subject subject = { .packet = datagram,
				   .len = segment_len,
				   .span = len,
				   .outer = origin.outer,
				   .port = ntohs(batch->receive_from[number].sin_port),
				   .hop = origin.hop,
				   .wait_ns = wait_ns };
	const uint64_t count = segment_len ? (len + segment_len - 1) / segment_len : 1;
	size_t left = len;

	message->msg_namelen = sizeof(batch->receive_from[number]);
	message->msg_controllen = sizeof(batch->receive_control[number]);
	count_read(worker, &worker->counters.decap, count, &subject);
	subject.len = len;
	subject.span = 0;
	count_heard(worker, count, &subject, now_ns);
	origin.port = subject.port;
	origin.packet_id = subject.packet_id;
	batch->coalescer.origin = origin;
	do {
		subject.packet = datagram;
		subject.len = left < segment_len ? left : segment_len;
		receive_one(batch, datagram, &subject);
		datagram += subject.len;
		left -= subject.len;
	} while (left);
}

bool batch_decap_iteration(struct batch *batch)
{
	struct tundp_worker *worker = batch->worker;
	const uint32_t slots = worker->config.offloads & TUNDP_OFFLOAD_UDP_GRO ?
				       SUPER_RECEIVE_SLOTS :
				       RECEIVE_SLOTS;
	struct tundp_direction *direction = &worker->counters.decap;
	const uint64_t before = direction->packets_in;
	uint64_t now_ns, began_ns;
	int count;

	socket_wait_call(worker);
	count = recvmmsg(worker->config.udp_fd, batch->receive_messages, slots, MSG_DONTWAIT, NULL);
	worker->counters.syscalls++;
	if (count < 0) {
		/* May be the pending error of an earlier send (ICMP): ignored. Whatever is queued
		 * behind it makes epoll report the socket again. */
		return errno == EINTR;
	}
	began_ns = latency_begin(&worker->decap_batches);
	now_ns = clock_coarse_ns();
	socket_wait_returned(worker);
	batch->coalescer.is_tcp_on = publish_has(worker, TUNDP_OFFLOAD_TCP_COALESCE);
	batch->coalescer.is_udp_on = publish_has(worker, TUNDP_OFFLOAD_UDP_COALESCE);
	for (int i = 0; i < count; i++)
		receive_message(batch, (uint32_t)i, now_ns);
	coalesce_flush(&batch->coalescer);
	latency_end(direction, before, began_ns);
	return (uint32_t)count == slots;
}
