/* The least that a forwarder between a TUN and a UDP socket can do: the crossings, and what the
 * payload needs to arrive. No lookup, no sums over payload, no counters, no copies in user space:
 * what it reads is sent from where it was read, in pieces, and written from where it was received. One
 * thread for both ways, as an engine has by default.
 *
 * A super-packet is cut by copying its header before each piece; inner checksums stay as they are
 * and are wrong on the wire. The other end, which must be another of these, gives each packet to
 * the kernel as one whose checksum is still to be completed (NEEDS_CSUM). Datagrams that came
 * together are written as one super-packet if they are of one flow in order: without that they
 * would be others' bytes. See traffic.h. */
#include <arpa/inet.h>
#include <netinet/udp.h>
#include <poll.h>
#include <sys/uio.h>
#include <unistd.h>

#include "loop.h"

/* linux/udp.h; absent from some libc headers. */
#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif

enum {
	SEGMENTS_MAX = 64, /* linux/udp.h: UDP_MAX_SEGMENTS before 6.11 */
	DATAGRAMS_LEN_MAX = 65507,
	HEADERS_MAX = 120,
	READ_LEN = 65536 + 128,
	IP_LEN = 20,
	UDP_LEN = 8,
	TCP_LEN = 20,
	TCP_FIN_PSH = 0x09,
	TCP_ACK = 0x10,
	TURNS = 64,
	PATIENCE_MS = 1000,
};

enum { NEEDS_CSUM = 1, GSO_TCPV4 = 1, GSO_UDP_L4 = 5 };

/* linux/virtio_net.h: struct virtio_net_hdr, little or native endian as the TUN has it. */
struct vnet {
	uint8_t flags;
	uint8_t gso_type;
	uint16_t hdr_len;
	uint16_t gso_size;
	uint16_t csum_start;
	uint16_t csum_offset;
};

static inline uint16_t get16(const uint8_t *at)
{
	return (uint16_t)(at[0] << 8 | at[1]);
}

static inline void put16(uint8_t *at, uint16_t value)
{
	at[0] = (uint8_t)(value >> 8);
	at[1] = (uint8_t)value;
}

static inline uint32_t get32(const uint8_t *at)
{
	return (uint32_t)get16(at) << 16 | get16(at + 2);
}

static inline void put32(uint8_t *at, uint32_t value)
{
	put16(at, (uint16_t)(value >> 16));
	put16(at + 2, (uint16_t)value);
}

static inline uint16_t fold(uint32_t sum)
{
	sum = (sum & 0xFFFF) + (sum >> 16);
	return (uint16_t)((sum & 0xFFFF) + (sum >> 16));
}

/* Of an even number of bytes, in network order. */
static uint32_t sum_words(const uint8_t *at, uint32_t len)
{
	uint32_t sum = 0;

	for (uint32_t i = 0; i < len; i += 2)
		sum += get16(at + i);
	return sum;
}

/* Bytes of both headers of a whole TCP or UDP packet without IPv4 options; 0 for any other. */
static uint32_t headers_of(const uint8_t *packet, uint32_t len)
{
	uint32_t header_len = IP_LEN + UDP_LEN;

	if (len < header_len || packet[0] != 0x45 || get16(packet + 6) & 0x3FFF)
		return 0;
	if (packet[9] == IPPROTO_TCP) {
		if (len < IP_LEN + TCP_LEN)
			return 0;
		header_len = IP_LEN + (packet[IP_LEN + 12] >> 4) * 4u;
		return header_len >= IP_LEN + TCP_LEN && header_len <= len ? header_len : 0;
	}
	return packet[9] == IPPROTO_UDP ? header_len : 0;
}

/* What becomes of a read. */
struct outbox {
	uint8_t headers[SEGMENTS_MAX][HEADERS_MAX];
	struct iovec pieces[2 * SEGMENTS_MAX];
	union {
		struct cmsghdr header;
		uint8_t bytes[CMSG_SPACE(sizeof(uint16_t))];
	} control;
	uint8_t read[READ_LEN];
};

/* Waits for room as long as there is none: what is read is not lost here. */
static int send_pieces(int udp, struct outbox *outbox, uint32_t pieces, uint16_t segment_len)
{
	struct pollfd room = { .fd = udp, .events = POLLOUT };
	struct msghdr message = { .msg_iov = outbox->pieces, .msg_iovlen = pieces };

	if (segment_len) {
		message.msg_control = &outbox->control;
		message.msg_controllen = sizeof(outbox->control);
		outbox->control.header = (struct cmsghdr){ .cmsg_len = CMSG_LEN(sizeof(uint16_t)),
							   .cmsg_level = IPPROTO_UDP,
							   .cmsg_type = UDP_SEGMENT };
		memcpy(CMSG_DATA(&outbox->control.header), &segment_len, sizeof(segment_len));
	}
	while (sendmsg(udp, &message, 0) < 0) {
		if (errno != EAGAIN)
			return errno;
		(void)poll(&room, 1, PATIENCE_MS);
	}
	return 0;
}

/* A super-packet of `len` bytes, its headers `header_len`; the pieces borrow from the read. */
static int send_cut(int udp, struct outbox *outbox, const uint8_t *packet, uint32_t len,
		    uint32_t header_len, uint32_t gso_size)
{
	const int is_tcp = packet[9] == IPPROTO_TCP;
	const uint32_t segment_len = header_len + gso_size;
	uint32_t most = DATAGRAMS_LEN_MAX / segment_len;
	uint32_t at = header_len, number = 0;
	uint16_t id = get16(packet + 4);
	uint32_t seq = is_tcp ? get32(packet + IP_LEN + 4) : 0;
	int error = 0;

	if (most > SEGMENTS_MAX)
		most = SEGMENTS_MAX;
	while (at < len && !error) {
		uint8_t *header = outbox->headers[number];
		const uint32_t piece = len - at < gso_size ? len - at : gso_size;

		memcpy(header, packet, header_len);
		put16(header + 2, (uint16_t)(header_len + piece));
		put16(header + 4, id++);
		if (is_tcp) {
			put32(header + IP_LEN + 4, seq);
			if (at + piece < len)
				header[IP_LEN + 13] &= (uint8_t)~TCP_FIN_PSH;
			seq += gso_size;
		} else {
			put16(header + IP_LEN + 4, (uint16_t)(UDP_LEN + piece));
		}
		outbox->pieces[2 * number] = (struct iovec){ header, header_len };
		outbox->pieces[2 * number + 1] =
			(struct iovec){ (void *)(uintptr_t)(packet + at), piece };
		at += piece;
		if (++number == most || at == len) {
			error = send_pieces(udp, outbox, 2 * number,
					    number > 1 ? (uint16_t)segment_len : 0);
			number = 0;
		}
	}
	return error;
}

/* One read, sent: 1, 0 if there was nothing, -1 with `traffic->error`. */
static int encap_one(int tun, int udp, struct outbox *outbox, struct traffic *traffic)
{
	const ssize_t got = read(tun, outbox->read, sizeof(outbox->read));
	const uint8_t *packet = outbox->read + sizeof(struct vnet);
	struct vnet vnet;
	uint32_t len;
	int error;

	if (got < 0 && is_passing(errno))
		return 0;
	if (got < (ssize_t)sizeof(vnet) + IP_LEN) {
		traffic->error = got < 0 ? errno : EBADMSG;
		return -1;
	}
	memcpy(&vnet, outbox->read, sizeof(vnet));
	len = (uint32_t)got - (uint32_t)sizeof(vnet);
	if (packet[0] != 0x45)
		return 1; /* IPv6's neighbours, options: none of ours */
	if (vnet.gso_type && vnet.gso_size && headers_of(packet, len)) {
		error = send_cut(udp, outbox, packet, len, headers_of(packet, len), vnet.gso_size);
	} else {
		outbox->pieces[0] = (struct iovec){ outbox->read + sizeof(vnet), len };
		error = send_pieces(udp, outbox, 1, 0);
	}
	if (error)
		add(&traffic->refused, 1);
	return 1;
}

/* What becomes of a receive. */
struct bare_inbox {
	struct iovec pieces[2 + 2 * SEGMENTS_MAX];
	union {
		struct cmsghdr header;
		uint8_t bytes[CMSG_SPACE(sizeof(int))];
	} control;
	uint8_t received[READ_LEN];
};

/* Whether `next` goes on where a super-packet with that first packet ends: `sent` payload bytes. */
static int goes_on(const uint8_t *first, const uint8_t *next, uint32_t header_len, uint32_t len,
		   uint32_t sent)
{
	if (len <= header_len || headers_of(next, len) != header_len ||
	    memcmp(first + 9, next + 9, 1) || memcmp(first + 12, next + 12, 12))
		return 0;
	if (first[9] == IPPROTO_UDP)
		return 1;
	/* Sequence; acknowledgement; of the flags what is more than PSH; options. */
	return get32(next + IP_LEN + 4) == get32(first + IP_LEN + 4) + sent &&
	       !memcmp(first + IP_LEN + 8, next + IP_LEN + 8, 5) &&
	       (next[IP_LEN + 13] & ~8) == TCP_ACK && first[IP_LEN + 13] == TCP_ACK &&
	       !memcmp(first + IP_LEN + 20, next + IP_LEN + 20, header_len - IP_LEN - 20);
}

/* Writes the packets at the start of `len` bytes, each `segment_len`, that make one; their bytes. */
static uint32_t write_some(int tun, int has_uso, struct bare_inbox *inbox, uint8_t *packet,
			   uint32_t len, uint32_t segment_len, struct traffic *traffic)
{
	uint32_t taken = len < segment_len ? len : segment_len;
	const uint32_t header_len = headers_of(packet, taken);
	const int is_tcp = packet[9] == IPPROTO_TCP;
	struct vnet vnet = { 0 };
	uint32_t count = 2, whole = taken;

	inbox->pieces[0] = (struct iovec){ &vnet, sizeof(vnet) };
	inbox->pieces[1] = (struct iovec){ packet, taken };
	while (header_len && (is_tcp || has_uso) && taken < len && taken % segment_len == 0) {
		const uint32_t next = len - taken < segment_len ? len - taken : segment_len;

		if (count > SEGMENTS_MAX || whole + next - header_len > 65535 ||
		    !goes_on(packet, packet + taken, header_len, next, whole - header_len))
			break;
		inbox->pieces[count++] =
			(struct iovec){ packet + taken + header_len, next - header_len };
		if (is_tcp)
			packet[IP_LEN + 13] |= packet[taken + IP_LEN + 13];
		taken += next;
		whole += next - header_len;
		if (is_tcp && packet[IP_LEN + 13] != TCP_ACK)
			break; /* PSH ends it */
	}
	if (header_len) {
		const uint32_t transport_len = whole - IP_LEN;
		uint8_t *field = packet + IP_LEN + (is_tcp ? 16 : 6);

		if (count > 2) {
			vnet.gso_type = is_tcp ? GSO_TCPV4 : GSO_UDP_L4;
			vnet.hdr_len = (uint16_t)header_len;
			vnet.gso_size = (uint16_t)(segment_len - header_len);
			if (!is_tcp)
				put16(packet + IP_LEN + 4, (uint16_t)transport_len);
		}
		vnet.flags = NEEDS_CSUM;
		vnet.csum_start = IP_LEN;
		vnet.csum_offset = is_tcp ? 16 : 6;
		put16(field, fold(sum_words(packet + 12, 8) + packet[9] + transport_len));
		put16(packet + 2, (uint16_t)whole);
		put16(packet + 10, 0);
		put16(packet + 10, (uint16_t)~fold(sum_words(packet, IP_LEN)));
	}
	if (writev(tun, inbox->pieces, (int)count) < 0)
		add(&traffic->refused, 1);
	return taken;
}

/* One receive, written: as encap_one. */
static int decap_one(int udp, int tun, int has_uso, struct bare_inbox *inbox,
		     struct traffic *traffic)
{
	struct iovec whole = { inbox->received, sizeof(inbox->received) };
	struct msghdr message = { .msg_iov = &whole,
				  .msg_iovlen = 1,
				  .msg_control = &inbox->control,
				  .msg_controllen = sizeof(inbox->control) };
	const ssize_t got = recvmsg(udp, &message, 0);
	const struct cmsghdr *control = CMSG_FIRSTHDR(&message);
	int segment_len = (int)got;

	if (got < 0 && (is_passing(errno) || errno == ECONNREFUSED))
		return 0;
	if (got < 0) {
		traffic->error = errno;
		return -1;
	}
	if (control && control->cmsg_level == IPPROTO_UDP && control->cmsg_type == UDP_GRO)
		memcpy(&segment_len, CMSG_DATA(control), sizeof(segment_len));
	if (segment_len <= 0)
		return 1;
	for (uint32_t at = 0; at + IP_LEN <= (uint32_t)got;)
		at += write_some(tun, has_uso, inbox, inbox->received + at, (uint32_t)got - at,
				 (uint32_t)segment_len, traffic);
	return 1;
}

void bare_forward(int tun, int udp, int has_uso, struct traffic *traffic)
{
	static _Thread_local struct outbox outbox;
	static _Thread_local struct bare_inbox inbox;

	while (!is_stopped(traffic)) {
		struct pollfd both[] = { { .fd = tun, .events = POLLIN },
					 { .fd = udp, .events = POLLIN } };
		int out = 1, in = 1;

		for (int turn = 0; turn < TURNS && (out > 0 || in > 0); turn++) {
			if (out > 0)
				out = encap_one(tun, udp, &outbox, traffic);
			if (in > 0)
				in = decap_one(udp, tun, has_uso, &inbox, traffic);
			if (out < 0 || in < 0)
				return;
		}
		if (!out && !in)
			(void)poll(both, 2, PATIENCE_MS);
	}
}
