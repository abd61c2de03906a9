/* One packet's way through a worker, each direction. Python twin: tundp/engine/reference.py. */
#include "single.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "device_mtu.h"
#include "fib.h"
#include "ip.h"
#include "publish.h"

/* The generic cell rate algorithm: the bucket is full again at *full_at_ns, and each token moves
 * that by one token's time, at most a burst's time ahead. */
int tundp_may_reply(uint64_t *full_at_ns, uint32_t rate_per_s, uint64_t now_ns)
{
	const uint64_t cost_ns = 1000000000u / rate_per_s;
	uint64_t before = __atomic_load_n(full_at_ns, __ATOMIC_RELAXED);

	for (;;) {
		const uint64_t after = (before > now_ns ? before : now_ns) + cost_ns;

		if (after - now_ns > cost_ns * TUNDP_ICMP_BURST)
			return 0;
		if (__atomic_compare_exchange_n(full_at_ns, &before, after, 0, __ATOMIC_RELAXED,
						__ATOMIC_RELAXED))
			return 1;
	}
}

static bool may_reply(struct tundp_worker *worker, uint64_t *full_at_ns, uint32_t rate_per_s)
{
	if (tundp_may_reply(full_at_ns, rate_per_s, clock_now_ns()))
		return true;
	worker->counters.icmp_rate_limited++;
	return false;
}

/* By the last octet of the answer's destination: a flood of one pod takes nobody else's answers. */
static bool may_reply_to_tun(struct tundp_worker *worker, const uint8_t *answer)
{
	return may_reply(worker, worker->config.icmp_full_at_ns + answer[19],
			 TUNDP_ICMP_RATE_PER_S);
}

/* About a packet that came from this hop, 0 for whoever is no peer. */
static bool may_reply_to_peer(struct tundp_worker *worker, uint32_t about)
{
	const uint32_t bucket = about ? 1 + about % (TUNDP_ICMP_WIRE_BUCKETS - 1) : 0;

	return may_reply(worker,
			 worker->config.icmp_full_at_ns + TUNDP_ICMP_LOCAL_BUCKETS + bucket,
			 TUNDP_ICMP_WIRE_RATE_PER_S);
}

/* Sends by the shared socket, or by the hop's own, which has to be told what it sends from. */
static int send_by(struct tundp_worker *worker, int fd, const struct tundp_hop *endpoint,
		   const struct iovec *data)
{
	struct sockaddr_in to = {
		.sin_family = AF_INET,
		.sin_port = htons(endpoint->port),
		.sin_addr.s_addr = htonl(endpoint->address),
	};
	union send_control control;
	struct msghdr message = {
		.msg_name = &to,
		.msg_namelen = sizeof(to),
		.msg_iov = (struct iovec *)data,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control.part.source),
	};
	ssize_t sent;

	if (fd != worker->config.udp_fd)
		hop_sockets_source(worker, &control);
	do {
		worker->counters.syscalls++;
		if (fd == worker->config.udp_fd)
			sent = sendto(fd, data->iov_base, data->iov_len, MSG_DONTWAIT,
				      (const struct sockaddr *)&to, sizeof(to));
		else
			sent = sendmsg(fd, &message, MSG_DONTWAIT);
	} while (sent < 0 && errno == EINTR);
	return sent < 0 ? errno : 0;
}

/* 0, or the errno of a refusal. */
static int send_datagram(struct tundp_worker *worker, const struct destination *to,
			 const uint8_t *data, size_t len)
{
	const struct iovec datagram = { (void *)data, len };
	int fd = hop_sockets_find(worker, to);
	int error = fd < 0 ? EAGAIN : send_by(worker, fd, &to->way, &datagram);

	if (error == EAGAIN && fd == worker->config.udp_fd) {
		fd = hop_sockets_open(worker, to);
		if (fd >= 0)
			error = send_by(worker, fd, &to->way, &datagram);
	}
	if (fd >= 0 && fd != worker->config.udp_fd)
		hop_sockets_used(worker, to, !error);
	return error;
}

/* Sends a packet, or its fragments until one is refused: 0, or the errno of the refusal. */
static int send_packet(struct tundp_worker *worker, struct outgoing *outgoing)
{
	size_t piece, len, taken = 0;
	int error;

	if (!outgoing->fragment_mtu) {
		outgoing->bytes_out = outgoing->len;
		return send_datagram(worker, &outgoing->to, outgoing->packet, outgoing->len);
	}
	while ((piece = tundp_fragment(outgoing->packet, outgoing->fragment_mtu, taken,
				       worker->piece, &len))) {
		error = send_datagram(worker, &outgoing->to, worker->piece, len);
		if (error)
			return error;
		taken += piece;
		outgoing->bytes_out += len;
		outgoing->fragment_count++;
	}
	worker->counters.fragments_out += outgoing->fragment_count;
	return 0;
}

/* The MTU of the device to an endpoint, less our headers; 0 unknown. */
static uint16_t ask_inner_mtu(struct tundp_worker *worker, const struct tundp_hop *endpoint)
{
	int mtu = device_mtu(worker->config.address, endpoint, worker->piece);

	worker->counters.syscalls += DEVICE_MTU_SYSCALLS;
	if (!mtu)
		return 0;
	mtu -= TUNDP_OVERHEAD;
	if (mtu > TUNDP_MAX_DATAGRAM_LEN)
		mtu = TUNDP_MAX_DATAGRAM_LEN;
	return (uint16_t)(mtu < TUNDP_IP_MIN_MTU ? TUNDP_IP_MIN_MTU : mtu);
}

/* What the device to a hop takes becomes the hop's limit, which Python forgets again after a while.
 * Returns the limit that holds now, 0 if there is none. */
static uint16_t learn_inner_mtu(struct tundp_worker *worker, const struct tundp_fib *fib,
				const struct destination *to)
{
	struct tundp_path *path = &fib->paths[to->hop];
	const uint16_t mtu = ask_inner_mtu(worker, &to->endpoint);

	/* The hop id may stand for another endpoint since the packet was decided. */
	if (!fib_is_hop(fib, to->hop, &to->endpoint))
		return mtu;
	if (mtu) {
		__atomic_store_n(&path->inner_mtu, mtu, __ATOMIC_RELAXED);
		publish_news(worker);
	}
	return fib_path_mtu(path);
}

static void drop(struct tundp_worker *worker, const struct outgoing *outgoing, uint32_t reason,
		 const struct subject *subject)
{
	const struct tally tally = { .packets = 1, .bytes_in = outgoing->bytes_in };

	count_dropped(worker, &worker->counters.encap, &tally, reason, subject);
}

/* Decides a packet again that was refused with EMSGSIZE. True if it may be sent again. */
static bool narrow(struct tundp_worker *worker, const struct tundp_fib *fib,
		   struct outgoing *outgoing, const struct subject *subject)
{
	const uint16_t mtu = learn_inner_mtu(worker, fib, &outgoing->to);
	struct tundp_verdict verdict;

	tundp_narrow(&worker->config.policy, outgoing->packet, outgoing->to.hop, mtu, &verdict);
	if (verdict.kind == TUNDP_FORWARD) {
		outgoing->fragment_mtu = verdict.fragment_mtu;
		outgoing->bytes_out = 0;
		outgoing->fragment_count = 0;
		return true;
	}
	drop(worker, outgoing, verdict.reason, subject);
	if (verdict.kind == TUNDP_REPLY)
		single_reply_to_tun(worker, &verdict);
	return false;
}

void single_forward(struct tundp_worker *worker, const struct tundp_fib *fib,
		    struct outgoing *outgoing)
{
	struct subject subject = { .packet = outgoing->packet,
				   .len = outgoing->len,
				   .outer = outgoing->to.endpoint.address,
				   .port = outgoing->to.endpoint.port,
				   .hop = outgoing->to.hop,
				   .packet_id = outgoing->packet_id };

	subject.error = send_packet(worker, outgoing);
	if (subject.error == EMSGSIZE) {
		/* Learn the path MTU and decide the packet again. The second result is final. */
		(void)count_send_refusal(worker, &subject);
		if (!narrow(worker, fib, outgoing, &subject))
			return;
		subject.error = send_packet(worker, outgoing);
	}
	if (subject.error) {
		drop(worker, outgoing, count_send_refusal(worker, &subject), &subject);
	} else {
		const struct tally tally = { .packets = 1,
					     .bytes_in = outgoing->bytes_in,
					     .bytes_out = outgoing->bytes_out };

		subject.together = outgoing->fragment_count;
		count_sent(worker, &tally, &subject);
	}
}

void single_encapsulate(struct tundp_worker *worker, const struct tundp_fib *fib, uint8_t *packet,
			struct subject *subject)
{
	const size_t len = subject->len;
	const struct tally tally = { .packets = 1, .bytes_in = len };
	struct tundp_verdict verdict;
	struct outgoing outgoing;

	tundp_encapsulate(fib, &worker->config.policy, packet, len, &verdict);
	if (verdict.kind != TUNDP_FORWARD) {
		single_route(fib, verdict.hop, subject);
		count_dropped(worker, &worker->counters.encap, &tally, verdict.reason, subject);
		if (verdict.kind == TUNDP_REPLY)
			single_reply_to_tun(worker, &verdict);
		return;
	}
	outgoing = (struct outgoing){
		.to = hop_destination(fib, verdict.hop),
		.packet = packet,
		.len = verdict.len,
		.fragment_mtu = verdict.fragment_mtu,
		.bytes_in = len,
		.packet_id = subject->packet_id,
	};
	single_forward(worker, fib, &outgoing);
}

static void hand_over(struct tundp_worker *worker, int fd, const uint8_t *packet, uint32_t len)
{
	if (!len || fd < 0)
		return;
	worker->counters.syscalls++;
	(void)send(fd, packet, len, MSG_DONTWAIT | MSG_NOSIGNAL);
}

void single_hand_over(struct tundp_worker *worker, const uint8_t *packet,
		      const struct tundp_verdict *verdict)
{
	hand_over(worker, worker->config.echo_fd, packet, verdict->echo_len);
	hand_over(worker, worker->config.peer_fd, packet, verdict->peer_len);
}

int single_write_tun(struct tundp_worker *worker, const uint8_t *data, size_t len)
{
	ssize_t written;

	do {
		worker->counters.syscalls++;
		written = write(worker->config.tun_fd, data, len);
	} while (written < 0 && errno == EINTR);
	return written < 0 ? errno : 0;
}

void single_reply_to_tun(struct tundp_worker *worker, const struct tundp_verdict *verdict)
{
	const size_t vnet_len =
		worker->config.offloads & TUNDP_OFFLOAD_VNET_HEADER ? TUNDP_VNET_LEN : 0;
	uint8_t whole[TUNDP_VNET_LEN + TUNDP_REPLY_MAX] = { 0 };

	if (!may_reply_to_tun(worker, verdict->reply))
		return;
	memcpy(whole + vnet_len, verdict->reply, verdict->reply_len);
	if (single_write_tun(worker, whole, vnet_len + verdict->reply_len))
		worker->counters.icmp_undeliverable++;
	else
		worker->counters.icmp_to_tun++;
}

/* Sends an ICMP error about a packet from the wire to the peer that holds the packet's source. */
void single_reply_to_peer(struct tundp_worker *worker, const struct tundp_fib *fib,
			  const struct tundp_verdict *verdict, const struct subject *subject)
{
	struct tundp_verdict way;
	uint8_t reply[TUNDP_REPLY_MAX];

	if (!may_reply_to_peer(worker, subject->hop))
		return;
	memcpy(reply, verdict->reply, verdict->reply_len);
	tundp_encapsulate(fib, &worker->config.policy, reply, verdict->reply_len, &way);
	if (way.kind == TUNDP_FORWARD) {
		struct outgoing outgoing = {
			.to = hop_destination(fib, way.hop),
			.packet = reply,
			.len = way.len,
			.fragment_mtu = way.fragment_mtu,
		};

		if (send_packet(worker, &outgoing) == 0) {
			worker->counters.icmp_to_peers++;
			return;
		}
	}
	worker->counters.icmp_undeliverable++;
}

int single_decapsulate(struct tundp_worker *worker, const struct tundp_fib *fib, uint8_t *datagram,
		       const struct subject *subject)
{
	struct tundp_direction *direction = &worker->counters.decap;
	struct tally tally = { .packets = 1, .bytes_in = subject->len };
	struct subject written = *subject;
	struct tundp_verdict verdict;

	tundp_decapsulate(fib, &worker->config.policy, datagram, subject->len, subject->outer,
			  subject->port, &verdict);
	if (verdict.kind != TUNDP_DELIVER) {
		count_dropped(worker, direction, &tally, verdict.reason, subject);
		if (verdict.kind == TUNDP_REPLY)
			single_reply_to_peer(worker, fib, &verdict, subject);
		return 0;
	}
	count_mismatches(worker, &verdict, subject);
	single_hand_over(worker, datagram, &verdict);
	tally.bytes_out = verdict.len;
	written.len = verdict.len;
	written.error = single_write_tun(worker, datagram, verdict.len);
	if (written.error)
		count_dropped(worker, direction, &tally, count_tun_refusal(worker, &written),
			      &written);
	else
		count_delivered(worker, &tally, &written);
	return written.error == EBADFD ? -EBADFD : 0;
}
