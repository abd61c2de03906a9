/* Trains: neighbours of equal size for one peer, that leave in one send (UDP_SEGMENT), in the
 * order their packets were read. A refused train is sent again, whole or packet by packet, by the
 * hop's own socket if the shared one is full, or dropped. Nothing blocks and nothing waits. */
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
	batch->arena_packets = 0;
	for (uint32_t i = 0; i < TRAINS_MAX; i++) {
		struct msghdr *message = &batch->send_messages[i].msg_hdr;
		union send_control *control = &batch->send_control[i];
		struct cmsghdr *segment = (struct cmsghdr *)(void *)control->part.segment;

		batch->send_to[i].sin_family = AF_INET;
		message->msg_name = &batch->send_to[i];
		message->msg_namelen = sizeof(batch->send_to[i]);
		message->msg_iov = &batch->send_iovecs[i];
		message->msg_iovlen = 1;
		hop_sockets_source(batch->worker, control);
		segment->cmsg_level = IPPROTO_UDP;
		segment->cmsg_type = UDP_SEGMENT;
		segment->cmsg_len = CMSG_LEN(sizeof(uint16_t));
	}
}

/* Writes the message of a train. is_own: it leaves by the hop's own socket. */
static void prepare(struct batch *batch, uint32_t at, bool is_own)
{
	const struct train *train = &batch->trains[at];
	struct msghdr *message = &batch->send_messages[at].msg_hdr;
	union send_control *control = &batch->send_control[at];
	struct cmsghdr *segment = (struct cmsghdr *)(void *)control->part.segment;
	const uint16_t segment_len = (uint16_t)train->segment_len;

	batch->send_to[at].sin_port = htons(train->to.way.port);
	batch->send_to[at].sin_addr.s_addr = htonl(train->to.way.address);
	batch->send_iovecs[at].iov_base = batch->send_arena + train->offset;
	batch->send_iovecs[at].iov_len = train->len;
	message->msg_control = NULL;
	message->msg_controllen = 0;
	if (is_own) {
		message->msg_control = control->part.source;
		message->msg_controllen = sizeof(control->part.source);
	}
	if (train->count > 1) {
		if (!is_own)
			message->msg_control = segment;
		message->msg_controllen += sizeof(control->part.segment);
		memcpy(CMSG_DATA(segment), &segment_len, sizeof(segment_len));
	}
}

/* The id of the packet of that number in the arena: at most that of the last read. */
static uint64_t packet_id(const struct batch *batch, uint32_t number)
{
	const uint64_t newest = batch->worker->counters.encap.reads;

	return newest - (uint32_t)((uint32_t)newest - batch->arena_ids[number]);
}

/* The packets of a train. */
static struct subject subject_of(const struct batch *batch, const struct train *train, int error)
{
	return (struct subject){ .packet = batch->send_arena + train->offset,
				 .len = train->len < train->segment_len ? train->len :
									  train->segment_len,
				 .outer = train->to.endpoint.address,
				 .port = train->to.endpoint.port,
				 .hop = train->to.hop,
				 .error = error,
				 .packet_id = packet_id(batch, train->first),
				 .span = train->len,
				 .ids = batch->arena_ids + train->first };
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

/* The packets of a train, one by one. */
static void send_one_by_one(struct batch *batch, struct train *train)
{
	struct tundp_worker *worker = batch->worker;

	for (; train->count; train->count--) {
		const uint64_t before = worker->counters.encap.packets_out;
		const struct subject first = subject_of(batch, train, 0);
		const uint32_t len = (uint32_t)first.len;
		struct outgoing outgoing = {
			.to = train->to,
			.packet = first.packet,
			.len = len,
			.fragment_mtu = len > train->fragment_mtu ? train->fragment_mtu : 0,
			.packet_id = first.packet_id,
			/* Bytes that were cut off behind a packet's end are the last one's. */
			.bytes_in = train->count == 1 ? train->bytes_in : len,
		};

		single_forward(worker, batch->fib, &outgoing);
		train->sent_count += (uint32_t)(worker->counters.encap.packets_out - before);
		train->first++;
		train->offset += len;
		train->len -= len;
		train->bytes_in -= outgoing.bytes_in;
	}
	learn_no_gso(batch, train);
}

static void drop_train(struct batch *batch, const struct train *train, uint32_t reason,
		       const struct subject *subject)
{
	struct tundp_worker *worker = batch->worker;
	const struct tally tally = { .packets = train->count, .bytes_in = train->bytes_in };

	count_dropped(worker, &worker->counters.encap, &tally, reason, subject);
}

/* Handles a train refused by `fd`. True: send it again, whole or one by one; false: it was
 * dropped. */
static bool retry(struct batch *batch, struct train *train, int fd, int error, int *tries)
{
	struct tundp_worker *worker = batch->worker;
	const struct subject subject = subject_of(batch, train, error);

	switch (error) {
	case EINTR:
		return true;
	case EAGAIN:
		if (fd == worker->config.udp_fd && hop_sockets_open(worker, &train->to) >= 0)
			return true;
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
	if (!batch->train_count) {
		batch->arena_len = 0;
		batch->arena_packets = 0;
	}
}

static void count_trains(struct batch *batch, uint32_t at, uint32_t count)
{
	for (; count > 0; count--, at++) {
		const struct train *train = &batch->trains[at];
		const struct subject subject = subject_of(batch, train, 0);
		const struct tally tally = { .packets = train->count,
					     .bytes_in = train->bytes_in,
					     .bytes_out = train->len };

		count_sent(batch->worker, &tally, &subject);
	}
}

/* Sends trains `at` to `end` by one descriptor: how many left, or -1 and errno. */
static int send_messages(struct batch *batch, int fd, uint32_t at, uint32_t end)
{
	struct tundp_worker *worker = batch->worker;
	int sent;

	if (fd < 0) {
		errno = EAGAIN;
		return -1;
	}
	worker->counters.syscalls++;
	sent = sendmmsg(fd, &batch->send_messages[at], end - at, MSG_DONTWAIT);
	if (fd != worker->config.udp_fd) {
		const int error = errno;

		hop_sockets_used(worker, &batch->trains[at].to, sent > 0);
		errno = error;
	}
	return sent;
}

/* Sends the first `count` trains. */
static void send_trains(struct batch *batch, uint32_t count)
{
	struct tundp_worker *worker = batch->worker;
	const int shared = worker->config.udp_fd;
	int tries = NO_BUFFER_TRIES;
	uint32_t at = 0;

	while (at < count) {
		struct train *train = &batch->trains[at];
		uint32_t end = at;
		int fd, sent;

		if (train->is_one_by_one) {
			send_one_by_one(batch, train);
			at++;
			continue;
		}
		fd = hop_sockets_find(worker, &train->to);
		do
			prepare(batch, end++, fd != shared);
		while (fd == shared && end < count && !batch->trains[end].is_one_by_one &&
		       hop_sockets_find(worker, &batch->trains[end].to) == shared);
		sent = send_messages(batch, fd, at, end);
		if (sent >= 0) {
			count_trains(batch, at, (uint32_t)sent);
			at += (uint32_t)sent;
			tries = NO_BUFFER_TRIES;
		} else if (!retry(batch, train, fd, errno, &tries)) {
			at++;
			tries = NO_BUFFER_TRIES;
		}
	}
	remove_trains(batch, count);
}

void train_send_all(struct batch *batch)
{
	if (batch->train_count)
		send_trains(batch, batch->train_count);
}

void train_send_full(struct batch *batch)
{
	const uint32_t count = batch->train_count;
	const struct train *last;

	if (count == 0)
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
			memmove(batch->arena_ids, batch->arena_ids + batch->trains[0].first,
				batch->trains[0].count * sizeof(batch->arena_ids[0]));
			batch->trains[0].first = 0;
			batch->trains[0].offset = 0;
			batch->arena_packets = batch->trains[0].count;
			batch->arena_len = len;
		}
	}
}

uint8_t *train_empty_arena(struct batch *batch)
{
	train_send_all(batch);
	return batch->send_arena;
}

/* Whether a packet of `len` bytes may join a train. */
static bool joins(const struct train *train, const struct destination *to, uint32_t len)
{
	return !train->is_closed && len <= train->segment_len && train->to.hop == to->hop &&
	       !memcmp(&train->to.endpoint, &to->endpoint, sizeof(to->endpoint)) &&
	       !memcmp(&train->to.way, &to->way, sizeof(to->way));
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
					 .first = batch->arena_packets,
					 .offset = batch->arena_len,
					 .len = len,
					 .segment_len = len,
					 .count = 1,
					 .fragment_mtu = lane->fragment_mtu,
					 .is_one_by_one = lane->fragment_mtu != 0,
					 .bytes_in = bytes_in };
	}
	batch->arena_len += len;
	batch->arena_ids[batch->arena_packets++] = (uint32_t)batch->reading.packet_id;
	train->is_closed = len < train->segment_len || train->count >= lane->count_max ||
			   train->len + train->segment_len > TUNDP_MAX_DATAGRAM_LEN;
}
