/* Trains: neighbours of equal size for one peer, that leave in one send (UDP_SEGMENT), in the
 * order their packets were read. A refused train is sent again, whole or packet by packet, or
 * dropped. Nothing here blocks: when the socket is full, `is_blocked` is set and the packets stay
 * in `trains` and `outgoing`. */
#include "train.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/udp.h>

#include "fib.h"
#include "publish.h"

enum { NO_BUFFER_TRIES = 3 };

/* linux/udp.h; absent from some libc headers. */
#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif

void train_init(struct batch *batch)
{
	batch->train_count = 0;
	batch->arena_len = 0;
	batch->is_blocked = false;
	batch->refusals = 0;
	batch->has_outgoing = false;
	for (uint32_t i = 0; i < TRAINS_MAX; i++) {
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

static void prepare(struct batch *batch, uint32_t at)
{
	const struct train *train = &batch->trains[at];
	struct msghdr *message = &batch->send_messages[at].msg_hdr;
	const uint16_t segment_len = (uint16_t)train->segment_len;

	batch->send_to[at].sin_port = htons(train->to.endpoint.port);
	batch->send_to[at].sin_addr.s_addr = htonl(train->to.endpoint.address);
	batch->send_iovecs[at].iov_base = batch->send_arena + train->offset;
	batch->send_iovecs[at].iov_len = train->len;
	message->msg_control = NULL;
	message->msg_controllen = 0;
	if (train->count > 1) {
		message->msg_control = &batch->send_control[at];
		message->msg_controllen = sizeof(batch->send_control[at]);
		memcpy(CMSG_DATA(&batch->send_control[at].align), &segment_len,
		       sizeof(segment_len));
	}
}

static struct subject subject_of(const struct batch *batch, const struct train *train, int error)
{
	return (struct subject){ .packet = batch->send_arena + train->offset,
				 .len = train->len < train->segment_len ? train->len :
									  train->segment_len,
				 .hop = train->to.hop,
				 .error = error };
}

/* Marks the path of a train as without UDP_SEGMENT, if the train was refused as a whole and some
 * of its packets, sent one by one, were not. If none left either (a blackhole route), UDP_SEGMENT
 * was not the reason. */
static void learn_no_gso(struct batch *batch, const struct train *train)
{
	const struct tundp_fib *fib = batch->fib;
	const uint32_t hop = train->to.hop;

	if ((train->refusal != EIO && train->refusal != EINVAL) || !train->sent_count)
		return;
	batch->worker->counters.offload_fallbacks++;
	if (fib_is_hop(fib, hop, &train->to.endpoint))
		__atomic_store_n(&fib->paths[hop].no_gso, 1, __ATOMIC_RELAXED);
	publish_news(batch->worker);
}

/* Makes the first packet of a train the outgoing one. */
static void begin_outgoing(struct batch *batch, const struct train *train)
{
	const struct subject first = subject_of(batch, train, 0);
	const uint32_t len = (uint32_t)first.len;

	batch->has_outgoing = true;
	batch->outgoing = (struct outgoing){
		.to = train->to,
		.packet = first.packet,
		.len = len,
		.fragment_mtu = len > train->fragment_mtu ? train->fragment_mtu : 0,
		/* Bytes that were cut off behind a packet's end are the last one's. */
		.bytes_in = train->count == 1 ? train->bytes_in : len,
	};
}

/* The packets of a train, one by one: false if the socket is full, and the train holds the rest. */
static bool send_one_by_one(struct batch *batch, struct train *train)
{
	struct tundp_worker *worker = batch->worker;

	while (train->count) {
		const uint64_t before = worker->counters.encap.packets_out;

		if (!batch->has_outgoing)
			begin_outgoing(batch, train);
		if (!single_forward(worker, batch->fib, &batch->outgoing)) {
			batch->is_blocked = true;
			return false;
		}
		batch->has_outgoing = false;
		train->sent_count += (uint32_t)(worker->counters.encap.packets_out - before);
		train->offset += batch->outgoing.len;
		train->len -= batch->outgoing.len;
		train->bytes_in -= batch->outgoing.bytes_in;
		train->count--;
	}
	learn_no_gso(batch, train);
	return true;
}

static void drop_train(struct batch *batch, const struct train *train, uint32_t reason,
		       const struct subject *subject)
{
	struct tundp_worker *worker = batch->worker;
	const struct tally tally = { .packets = train->count, .bytes_in = train->bytes_in };

	count_dropped(worker, &worker->counters.encap, &tally, reason, subject);
}

/* Handles a refused train. True: send it again, whole or one by one; false: it was dropped. */
static bool retry(struct batch *batch, struct train *train, int error, int *tries)
{
	struct tundp_worker *worker = batch->worker;
	const struct subject subject = subject_of(batch, train, error);

	switch (error) {
	case EINTR:
		return true;
	case EAGAIN:
		/* A socket that polls as writable and keeps refusing has another problem. */
		if (++batch->refusals < SEND_REFUSALS_MAX) {
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
		if (train->count == 1)
			break;
		/* fall through */
	case EMSGSIZE:
		/* That of a single packet is counted when it is sent again alone. */
		if (train->count > 1)
			(void)count_send_refusal(worker, &subject);
		train->refusal = error;
		train->is_one_by_one = true;
		return true;
	default:
		break;
	}
	drop_train(batch, train, count_send_refusal(worker, &subject), &subject);
	return false;
}

/* Removes the first `count` trains: sent or dropped. */
static void remove_trains(struct batch *batch, uint32_t count)
{
	batch->train_count -= count;
	memmove(batch->trains, batch->trains + count,
		batch->train_count * sizeof(batch->trains[0]));
	if (!batch->train_count)
		batch->arena_len = 0;
}

static void count_trains(struct batch *batch, uint32_t at, uint32_t count)
{
	for (; count > 0; count--, at++) {
		const struct train *train = &batch->trains[at];
		const struct subject subject = { .packet = batch->send_arena + train->offset,
						 .len = train->segment_len,
						 .hop = train->to.hop };
		const struct tally tally = { .packets = train->count,
					     .bytes_in = train->bytes_in,
					     .bytes_out = train->len };

		count_sent(batch->worker, &tally, &subject);
	}
}

/* Sends the first `count` trains, or as many as the socket has room for; what is left stays. */
static void send_trains(struct batch *batch, uint32_t count)
{
	struct tundp_worker *worker = batch->worker;
	int tries = NO_BUFFER_TRIES;
	uint32_t at = 0;

	while (at < count && !batch->is_blocked) {
		struct train *train = &batch->trains[at];
		uint32_t end = at;
		int sent;

		if (train->is_one_by_one) {
			if (send_one_by_one(batch, train))
				at++;
			continue;
		}
		while (end < count && !batch->trains[end].is_one_by_one)
			prepare(batch, end++);
		worker->counters.syscalls++;
		sent = sendmmsg(worker->config.udp_fd, &batch->send_messages[at], end - at,
				MSG_DONTWAIT);
		if (sent >= 0) {
			count_trains(batch, at, (uint32_t)sent);
			at += (uint32_t)sent;
			batch->refusals = 0;
			tries = NO_BUFFER_TRIES;
		} else if (!retry(batch, train, errno, &tries)) {
			at++;
			tries = NO_BUFFER_TRIES;
		}
	}
	remove_trains(batch, at);
}

void train_send_all(struct batch *batch)
{
	if (batch->train_count && !batch->is_blocked)
		send_trains(batch, batch->train_count);
}

void train_send_full(struct batch *batch)
{
	const uint32_t count = batch->train_count;
	const struct train *last;

	if (count == 0 || batch->is_blocked)
		return;
	last = &batch->trains[count - 1];
	if (last->is_closed && (last->count > 1 || count == TRAINS_MAX)) {
		train_send_all(batch);
	} else if (count > 1 && batch->trains[count - 2].count > 1) {
		const uint32_t len = last->len;

		send_trains(batch, count - 1);
		/* The open one moves to the front: the arena's first bytes are in the cache. */
		if (batch->train_count == 1 && batch->trains[0].offset >= len) {
			memcpy(batch->send_arena, batch->send_arena + batch->trains[0].offset, len);
			batch->trains[0].offset = 0;
			batch->arena_len = len;
		}
	}
}

uint8_t *train_empty_arena(struct batch *batch)
{
	train_send_all(batch);
	return batch->train_count ? NULL : batch->send_arena;
}

/* Whether a packet of `len` bytes may join a train. */
static bool joins(const struct train *train, const struct destination *to, uint32_t len)
{
	return !train->is_closed && len <= train->segment_len && train->to.hop == to->hop &&
	       !memcmp(&train->to.endpoint, &to->endpoint, sizeof(to->endpoint));
}

void train_append(struct batch *batch, const struct lane *lane, uint32_t len, uint64_t bytes_in)
{
	struct train *train = &batch->trains[batch->train_count];

	if (batch->train_count && joins(train - 1, &lane->to, len)) {
		train--;
		train->len += len;
		train->count++;
		train->bytes_in += bytes_in;
	} else {
		batch->train_count++;
		*train = (struct train){ .to = lane->to,
					 .offset = batch->arena_len,
					 .len = len,
					 .segment_len = len,
					 .count = 1,
					 .fragment_mtu = lane->fragment_mtu,
					 .is_one_by_one = lane->fragment_mtu != 0,
					 .bytes_in = bytes_in };
	}
	batch->arena_len += len;
	train->is_closed = len < train->segment_len || train->count >= lane->count_max ||
			   train->len + train->segment_len > TUNDP_MAX_DATAGRAM_LEN;
}

void train_abandon_all(struct batch *batch)
{
	for (uint32_t i = 0; i < batch->train_count; i++) {
		const struct subject subject = subject_of(batch, &batch->trains[i], 0);

		drop_train(batch, &batch->trains[i], TUNDP_DROP_SEND_NO_BUFFER, &subject);
	}
	remove_trains(batch, batch->train_count);
	batch->has_outgoing = false;
	batch->is_blocked = false;
}
