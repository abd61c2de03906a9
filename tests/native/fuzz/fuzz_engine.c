/* Any bytes through each direction of the batch engine: a real tundp_batch_run with a socket
 * pair for the TUN and UDP sockets on 127.0.0.1, once without offloads and once with all of
 * them. Afterwards every packet is accounted for: counted once, and found where it should be.
 *
 * The loop runs in this thread, so that one input does the same each time: all it shall read
 * lies there before, and when it is about to sleep it is stopped (the linker's --wrap gives
 * us its system calls). That is also where the kernel's refusals come from, which no loopback
 * socket would utter: no UDP_SEGMENT, no such super-packet, no room, device gone.
 *
 * Input: a byte of choices and one of refusals (below), then records (fuzz.h) of a vnet header
 * in the machine's byte order and a packet. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/udp.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "batch.h"
#include "fuzz.h"

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif

enum choice {
	MEND = 0x01,
	SOURCE_CHECK = 0x06,
	EIGHT_TIMES = 0x08,   /* each record */
	SEVENTY_TIMES = 0x10, /* more than one turn of the loop takes */
	SHORT_RUNS = 0x20,    /* three packets in a super-packet or a send at most */
	AS_SUPER = 0x40,      /* the datagrams in one GRO'd receive */
	NARROW = 0x80,        /* one hop takes 576 bytes only */
};

/* The low four bits of the second byte: how sending fails. */
enum send_refusal {
	SEND_NO_SEGMENT = 1, /* EIO, as a device without checksum offload has it */
	SEND_BAD_SEGMENT = 2,
	SEND_TOO_BIG = 3, /* above 1200 bytes */
	SEND_BUSY = 4,    /* every other call, of the shared socket */
	SEND_INTERRUPTED = 5,
	SEND_NO_BUFFER = 6, /* two of three calls */
	SEND_NEVER_BUFFER = 7,
	SEND_UNREACHABLE = 8,
	SEND_ONE_BY_ONE = 9,
};

/* The high four: the TUN. */
enum tun_refusal {
	TUN_NO_SUPER = 1,
	TUN_DOWN = 2,
	TUN_GONE_ON_WRITE = 3, /* the third */
	TUN_INTERRUPTED = 4,   /* every other call */
	TUN_REJECTS = 5,
	TUN_GONE_ON_READ = 6, /* the third */
	TUN_FULL = 7,
};

enum {
	MAX_RECORDS = 64,
	MAX_FED = 200,
	MAX_FED_LEN = 1 << 20,
	MAX_CHECKED_DATAGRAMS = 100, /* so many lie in the sink for sure */
	SOCKET_BUFFER_LEN = 8 << 20,
	TOO_BIG_LEN = 1200,
	SHORT_RUN = 3,
	/* In front of the first packet's vnet header: nobody's. */
	CANARY_LEN = HEADROOM - TUNDP_VNET_LEN,
	CANARY = 0xa5,
};

/* Packets, and their bytes. */
struct amount {
	uint64_t count;
	uint64_t len;
};

struct record {
	uint8_t *bytes; /* vnet header and packet */
	size_t len;
};

static struct {
	struct tundp_worker worker;
	struct batch *batch;
	struct tundp_hop_counters hop_counters[FUZZ_HOPS];
	struct tundp_hop_queue hop_queues[FUZZ_HOPS];
	uint64_t icmp_full_at_ns[TUNDP_ICMP_LOCAL_BUCKETS + TUNDP_ICMP_WIRE_BUCKETS];
	int tun;  /* our end of the TUN */
	int peer; /* sends datagrams */
	int sink; /* gets them */
	struct sockaddr_in udp;
	unsigned int send_refusal;
	unsigned int tun_refusal;
	unsigned int sends; /* calls so far, of this run */
	unsigned int writes;
	unsigned int reads;
} lab;

int __real_epoll_wait(int fd, struct epoll_event *events, int count, int timeout_ms);
int __wrap_epoll_wait(int fd, struct epoll_event *events, int count, int timeout_ms);
int __real_sendmmsg(int fd, struct mmsghdr *messages, unsigned int count, int flags);
int __wrap_sendmmsg(int fd, struct mmsghdr *messages, unsigned int count, int flags);
ssize_t __real_sendto(int fd, const void *data, size_t len, int flags, const struct sockaddr *to,
		      socklen_t to_len);
ssize_t __wrap_sendto(int fd, const void *data, size_t len, int flags, const struct sockaddr *to,
		      socklen_t to_len);
ssize_t __real_write(int fd, const void *data, size_t len);
ssize_t __wrap_write(int fd, const void *data, size_t len);
ssize_t __real_read(int fd, void *data, size_t len);
ssize_t __wrap_read(int fd, void *data, size_t len);

int __wrap_epoll_wait(int fd, struct epoll_event *events, int count, int timeout_ms)
{
	const int found = __real_epoll_wait(fd, events, count, 0);

	if (found == 0 && timeout_ms < 0)
		tundp_worker_stop(&lab.worker);
	return found;
}

/* The errno one datagram, or a train of `segment_len` each, is refused with, or 0. */
static int refusal(size_t len, bool is_train, size_t segment_len)
{
	switch (lab.send_refusal) {
	case SEND_NO_SEGMENT:
		return is_train ? EIO : 0;
	case SEND_BAD_SEGMENT:
		return is_train ? EINVAL : 0;
	case SEND_TOO_BIG:
		return (is_train ? segment_len : len) > TOO_BIG_LEN ? EMSGSIZE : 0;
	case SEND_BUSY:
		return lab.sends & 1 ? EAGAIN : 0;
	case SEND_INTERRUPTED:
		return lab.sends & 1 ? EINTR : 0;
	case SEND_NO_BUFFER:
		return lab.sends % 3 ? ENOBUFS : 0;
	case SEND_NEVER_BUFFER:
		return ENOBUFS;
	case SEND_UNREACHABLE:
		return ENETUNREACH;
	default:
		return 0;
	}
}

int __wrap_sendmmsg(int fd, struct mmsghdr *messages, unsigned int count, int flags)
{
	unsigned int taken = 0;
	int error = 0;

	if (fd != lab.worker.config.udp_fd)
		return __real_sendmmsg(fd, messages, count, flags);
	lab.sends++;
	for (; taken < count && !error; taken++) {
		const struct msghdr *message = &messages[taken].msg_hdr;
		uint16_t segment_len = 0;

		if (message->msg_control)
			memcpy(&segment_len, CMSG_DATA(CMSG_FIRSTHDR(message)), 2);
		error = refusal(message->msg_iov->iov_len, message->msg_control, segment_len);
		if (error)
			break;
	}
	if (taken == 0) {
		errno = error;
		return -1;
	}
	return __real_sendmmsg(fd, messages, lab.send_refusal == SEND_ONE_BY_ONE ? 1 : taken, flags);
}

ssize_t __wrap_sendto(int fd, const void *data, size_t len, int flags, const struct sockaddr *to,
		      socklen_t to_len)
{
	int error = 0;

	if (fd == lab.worker.config.udp_fd) {
		lab.sends++;
		error = refusal(len, false, 0);
	}
	if (error) {
		errno = error;
		return -1;
	}
	return __real_sendto(fd, data, len, flags, to, to_len);
}

static int write_refusal(const uint8_t *data)
{
	lab.writes++;
	switch (lab.tun_refusal) {
	case TUN_NO_SUPER:
		return lab.worker.config.offloads & TUNDP_OFFLOAD_VNET_HEADER && data[1] ? EINVAL : 0;
	case TUN_DOWN:
		return EIO;
	case TUN_GONE_ON_WRITE:
		return lab.writes >= 3 ? EBADFD : 0;
	case TUN_INTERRUPTED:
		return lab.writes & 1 ? EINTR : 0;
	case TUN_REJECTS:
		return EINVAL;
	case TUN_FULL:
		return EAGAIN;
	default:
		return 0;
	}
}

ssize_t __wrap_write(int fd, const void *data, size_t len)
{
	const int error = lab.batch && fd == lab.worker.config.tun_fd ? write_refusal(data) : 0;

	if (error) {
		errno = error;
		return -1;
	}
	return __real_write(fd, data, len);
}

ssize_t __wrap_read(int fd, void *data, size_t len)
{
	int error = 0;

	if (lab.batch && fd == lab.worker.config.tun_fd) {
		lab.reads++;
		if (lab.tun_refusal == TUN_GONE_ON_READ && lab.reads >= 3)
			error = EBADFD;
		if (lab.tun_refusal == TUN_INTERRUPTED && lab.reads & 1)
			error = EINTR;
	}
	if (error) {
		errno = error;
		return -1;
	}
	return __real_read(fd, data, len);
}

static void widen(int fd)
{
	const int len = SOCKET_BUFFER_LEN;

	/* More than net.core allows needs privileges; what it allows is mostly enough. */
	if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &len, sizeof(len)))
		(void)setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &len, sizeof(len));
	if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &len, sizeof(len)))
		(void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &len, sizeof(len));
}

static int udp_socket(struct sockaddr_in *address)
{
	const int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	socklen_t len = sizeof(*address);

	*address = (struct sockaddr_in){ .sin_family = AF_INET };
	address->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	REQUIRE(fd >= 0 && bind(fd, (struct sockaddr *)address, len) == 0);
	REQUIRE(getsockname(fd, (struct sockaddr *)address, &len) == 0);
	widen(fd);
	return fd;
}

static int tun_fd, udp_fd, control_fd, notify_fd, echo_fd, heads_fd, peer_fd, talk_fd;

static void open_lab(void)
{
	const int on = 1;
	struct sockaddr_in address;
	int pair[2];

	REQUIRE(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) == 0);
	widen(pair[0]);
	widen(pair[1]);
	tun_fd = pair[0];
	lab.tun = pair[1];
	REQUIRE(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) == 0);
	echo_fd = pair[0];
	heads_fd = pair[1];
	REQUIRE(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) == 0);
	peer_fd = pair[0];
	talk_fd = pair[1];
	udp_fd = udp_socket(&lab.udp);
	/* For one more control message to read; qemu's user mode has no such option. */
	(void)setsockopt(udp_fd, SOL_SOCKET, SO_RXQ_OVFL, &on, sizeof(on));
	lab.peer = udp_socket(&address);
	lab.sink = udp_socket(&address);
	for (int hop = FUZZ_HOP_WIDE; hop <= FUZZ_HOP_NARROW; hop++)
		fuzz_hops[hop] = (struct tundp_hop){ .address = FUZZ_LOOPBACK,
						     .port = ntohs(address.sin_port) };
	control_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	notify_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	REQUIRE(control_fd >= 0 && notify_fd >= 0);
	lab.batch = aligned_alloc(64, (tundp_batch_len() + 63) / 64 * 64);
	REQUIRE(lab.batch);
}

static void prepare(uint8_t choices, uint8_t refusals, bool has_offloads)
{
	struct tundp_worker *worker = &lab.worker;
	struct tundp_worker_config config = {
		.tun_fd = tun_fd,
		.udp_fd = udp_fd,
		.control_fd = control_fd,
		.notify_fd = notify_fd,
		.echo_fd = echo_fd,
		.peer_fd = peer_fd,
		.address = FUZZ_LOOPBACK,
		.directions = TUNDP_ENCAP | TUNDP_DECAP,
		.max_segments = 1,
		.max_udp_segments = 1,
		.policy = { .tun_address = FUZZ_TUNNEL,
			    .port = FUZZ_PORT,
			    .echo_id = FUZZ_ECHO_ID,
			    .source_check = (uint32_t)(choices & SOURCE_CHECK) / 2 % 3 },
		.memory = lab.batch,
		.hop_counters = lab.hop_counters,
		.hop_queues = lab.hop_queues,
		.icmp_full_at_ns = lab.icmp_full_at_ns,
	};

	tundp_worker_init(worker);
	if (has_offloads) {
		config.offloads = TUNDP_OFFLOAD_VNET_HEADER | TUNDP_OFFLOAD_UDP_SEGMENT |
				  TUNDP_OFFLOAD_TCP_COALESCE | TUNDP_OFFLOAD_UDP_COALESCE;
		if (choices & AS_SUPER)
			config.offloads |= TUNDP_OFFLOAD_UDP_GRO;
		config.max_segments = choices & SHORT_RUNS ? SHORT_RUN : 64;
		config.max_udp_segments = config.max_segments;
	}
	memset(lab.hop_counters, 0, sizeof(lab.hop_counters));
	memset(lab.hop_queues, 0, sizeof(lab.hop_queues));
	memset(lab.icmp_full_at_ns, 0, sizeof(lab.icmp_full_at_ns));
	REQUIRE(tundp_worker_configure(worker, &config) == 0);
	lab.send_refusal = refusals & 0x0f;
	lab.tun_refusal = refusals >> 4;
	lab.sends = lab.writes = lab.reads = 0;
	memset(lab.batch->receive_buffers[0], CANARY, CANARY_LEN);
	tundp_worker_install(worker, fuzz_fib(choices & NARROW ? 576 : 0));
}

static unsigned int times(uint8_t choices)
{
	return choices & SEVENTY_TIMES ? 70 : choices & EIGHT_TIMES ? 8 : 1;
}

static struct amount feed_tun(const struct record *records, size_t count, uint8_t choices)
{
	const size_t skip = lab.worker.config.offloads & TUNDP_OFFLOAD_VNET_HEADER ? 0 : TUNDP_VNET_LEN;
	struct amount fed = { 0 };

	for (unsigned int round = 0; round < times(choices); round++)
		for (size_t i = 0; i < count && fed.count < MAX_FED && fed.len < MAX_FED_LEN; i++) {
			const size_t len = records[i].len - skip;

			/* A read of nothing is how a socket pair would tell its end. */
			if (len && __real_write(lab.tun, records[i].bytes + skip, len) >= 0) {
				fed.count++;
				fed.len += len;
			}
		}
	return fed;
}

/* All packets in one send with UDP_SEGMENT, which the receiver gets as it is: the datagrams
 * that are in it, or none if the kernel has no such thing. */
static struct amount feed_super(const struct record *records, size_t count)
{
	static uint8_t whole[TUNDP_MAX_DATAGRAM_LEN];
	const uint16_t segment_len =
		(uint16_t)(count && records[0].len < TUNDP_MAX_DATAGRAM_LEN ?
				   records[0].len - TUNDP_VNET_LEN :
				   0);
	union {
		struct cmsghdr align;
		uint8_t bytes[CMSG_SPACE(sizeof(uint16_t))];
	} control = { 0 };
	struct iovec iovec = { whole, 0 };
	struct msghdr message = { .msg_name = &lab.udp,
				  .msg_namelen = sizeof(lab.udp),
				  .msg_iov = &iovec,
				  .msg_iovlen = 1,
				  .msg_control = &control,
				  .msg_controllen = sizeof(control) };

	for (size_t i = 0; i < count; i++) {
		const size_t len = records[i].len - TUNDP_VNET_LEN;

		if (len > sizeof(whole) - iovec.iov_len)
			break;
		memcpy(whole + iovec.iov_len, records[i].bytes + TUNDP_VNET_LEN, len);
		iovec.iov_len += len;
	}
	if (!segment_len)
		return (struct amount){ 0 };
	control.align.cmsg_level = IPPROTO_UDP;
	control.align.cmsg_type = UDP_SEGMENT;
	control.align.cmsg_len = CMSG_LEN(sizeof(segment_len));
	memcpy(CMSG_DATA(&control.align), &segment_len, sizeof(segment_len));
	if (sendmsg(lab.peer, &message, 0) < 0)
		return (struct amount){ 0 };
	return (struct amount){ .count = (iovec.iov_len + segment_len - 1) / segment_len,
				.len = iovec.iov_len };
}

static struct amount feed_udp(const struct record *records, size_t count, uint8_t choices)
{
	const int is_super = lab.worker.config.offloads & TUNDP_OFFLOAD_UDP_GRO ? 1 : 0;
	struct amount fed = { 0 };

	/* Older kernels have no UDP_GRO: they get single datagrams, all of them. */
	(void)setsockopt(lab.worker.config.udp_fd, IPPROTO_UDP, UDP_GRO, &is_super, sizeof(is_super));
	if (is_super)
		fed = feed_super(records, count);
	for (unsigned int round = 0; round < times(choices); round++)
		for (size_t i = 0; i < count && fed.count < MAX_FED && fed.len < MAX_FED_LEN; i++) {
			const size_t len = records[i].len - TUNDP_VNET_LEN;

			if (__real_sendto(lab.peer, records[i].bytes + TUNDP_VNET_LEN, len, 0,
					  (struct sockaddr *)&lab.udp, sizeof(lab.udp)) >= 0) {
				fed.count++;
				fed.len += len;
			}
		}
	return fed;
}

static void require_conserved(const struct tundp_direction *direction)
{
	uint64_t dropped = 0;

	for (int i = 0; i < TUNDP_DROP_COUNT; i++)
		dropped += direction->drops[i];
	REQUIRE(direction->packets_in == direction->packets_out + dropped);
}

/* What hops have counted adds up to what the directions have. */
static void require_hops(const struct tundp_counters *counters)
{
	struct tundp_hop_counters sum = { 0 };
	uint64_t drops = 0, full = 0;

	for (int hop = 0; hop < FUZZ_HOPS; hop++) {
		sum.packets_out += lab.hop_counters[hop].packets_out;
		sum.bytes_out += lab.hop_counters[hop].bytes_out;
		sum.packets_in += lab.hop_counters[hop].packets_in;
		sum.bytes_in += lab.hop_counters[hop].bytes_in;
		sum.drops += lab.hop_counters[hop].drops;
	}
	for (int i = 0; i < TUNDP_DROP_COUNT; i++)
		drops += counters->encap.drops[i] + counters->decap.drops[i];
	for (int hop = 0; hop < FUZZ_HOPS; hop++) {
		full += lab.hop_queues[hop].full;
		/* The worker has ended: none is left. */
		REQUIRE(lab.hop_queues[hop].socket == 0);
	}
	REQUIRE(full == counters->encap.drops[TUNDP_DROP_HOP_QUEUE_FULL]);
	REQUIRE(sum.packets_out == counters->encap.packets_out);
	REQUIRE(sum.bytes_out == counters->encap.bytes_out);
	REQUIRE(sum.packets_in == counters->decap.packets_in);
	REQUIRE(sum.bytes_in == counters->decap.bytes_in);
	REQUIRE(sum.drops == drops);
}

/* What was written to the TUN, as single packets. */
static struct amount drain_tun(void)
{
	const size_t vnet_len =
		lab.worker.config.offloads & TUNDP_OFFLOAD_VNET_HEADER ? TUNDP_VNET_LEN : 0;
	static uint8_t frame[TUNDP_VNET_LEN + 65536], out[65536 + 128 * 120];
	struct amount written = { 0 };
	ssize_t len;

	while ((len = __real_read(lab.tun, frame, sizeof(frame))) >= 0) {
		struct tundp_vnet vnet = { 0 };
		const uint8_t *at = out;
		uint32_t lens[128];
		int64_t made;

		REQUIRE((size_t)len >= vnet_len + 20);
		memcpy(&vnet, frame, vnet_len);
		made = tundp_segment(&vnet, frame + vnet_len, (size_t)len - vnet_len, 0, out,
				     sizeof(out), lens, 128);
		REQUIRE(made >= 1);
		for (int64_t i = 0; i < made; at += lens[i++]) {
			fuzz_require_ip(at, lens[i]);
			written.count++;
			written.len += lens[i];
		}
	}
	return written;
}

static struct amount drain_sink(void)
{
	static uint8_t datagram[65536];
	struct amount sunk = { 0 };
	ssize_t len;

	while ((len = recv(lab.sink, datagram, sizeof(datagram), 0)) >= 0) {
		fuzz_require_ip(datagram, (size_t)len);
		sunk.count++;
		sunk.len += (uint64_t)len;
	}
	return sunk;
}

/* Heads of answers to what measures paths: whole, for us, and no more of them than packets. */
static void drain_heads(uint64_t most)
{
	static uint8_t head[256];
	ssize_t len;

	while ((len = recv(heads_fd, head, sizeof(head), 0)) >= 0) {
		REQUIRE(most-- > 0);
		REQUIRE(len >= 44 && (size_t)len == fuzz_ip_header_len(head) + 24);
		REQUIRE(fuzz_be32(head + 16) == FUZZ_TUNNEL);
	}
}

/* Messages of other nodes, and what a kernel says of ours: whole, for us, not fragmented. */
static void drain_talk(uint64_t most)
{
	static uint8_t packet[2048];
	ssize_t len;

	while ((len = recv(talk_fd, packet, sizeof(packet), 0)) >= 0) {
		REQUIRE(most-- > 0);
		REQUIRE(len >= 20 && len <= 1500);
		REQUIRE(fuzz_be32(packet + 16) == FUZZ_TUNNEL);
		REQUIRE(!(fuzz_be16(packet + 6) & 0x3fff));
		REQUIRE(packet[9] == 253 ? (size_t)len == fuzz_be16(packet + 2) : packet[9] == 1);
	}
}

/* What a run that ended early left behind is not the next one's. */
static void drain_rest(void)
{
	static uint8_t byte;
	eventfd_t value;

	while (recv(tun_fd, &byte, 1, 0) >= 0)
		;
	while (recv(udp_fd, &byte, 1, 0) >= 0)
		;
	(void)eventfd_read(control_fd, &value);
	(void)eventfd_read(notify_fd, &value);
}

static void run(const struct record *records, size_t count, uint8_t choices, uint8_t refusals,
		bool has_offloads)
{
	const struct tundp_counters *counters = &lab.worker.counters;
	struct amount reads, datagrams, sunk, written;
	int code;

	prepare(choices, refusals, has_offloads);
	reads = feed_tun(records, count, choices);
	datagrams = feed_udp(records, count, choices);
	code = tundp_batch_run(&lab.worker);

	for (int i = 0; i < CANARY_LEN; i++)
		REQUIRE(lab.batch->receive_buffers[0][i] == CANARY);
	require_conserved(&counters->encap);
	require_conserved(&counters->decap);
	require_hops(counters);
	if (code) {
		REQUIRE(code == -EBADFD && (lab.tun_refusal == TUN_GONE_ON_WRITE ||
					    lab.tun_refusal == TUN_GONE_ON_READ));
	} else {
		REQUIRE(counters->encap.reads == reads.count);
		REQUIRE(counters->encap.packets_in >= reads.count);
		if (!has_offloads) {
			REQUIRE(counters->encap.packets_in == reads.count);
			REQUIRE(counters->encap.bytes_in == reads.len);
		}
		REQUIRE(counters->socket_overflows == 0);
		REQUIRE(counters->decap.packets_in == datagrams.count);
		REQUIRE(counters->decap.bytes_in == datagrams.len);
	}
	drain_heads(counters->decap.packets_in);
	drain_talk(counters->decap.packets_in);
	written = drain_tun();
	REQUIRE(written.count == counters->decap.packets_out + counters->icmp_to_tun);
	if (!counters->icmp_to_tun)
		REQUIRE(written.len == counters->decap.bytes_out);
	sunk = drain_sink();
	if (!lab.send_refusal && counters->encap.packets_out <= MAX_CHECKED_DATAGRAMS) {
		if (!counters->fragments_out)
			REQUIRE(sunk.count == counters->encap.packets_out + counters->icmp_to_peers);
		if (!counters->icmp_to_peers)
			REQUIRE(sunk.len == counters->encap.bytes_out);
	}
	drain_rest();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct fuzz_cursor cursor = { .at = data, .left = size };
	const uint8_t choices = fuzz_byte(&cursor), refusals = fuzz_byte(&cursor);
	struct record records[MAX_RECORDS];
	size_t count = 0;

	if (!lab.batch)
		open_lab();
	while (count < MAX_RECORDS) {
		struct record *record = &records[count];

		record->bytes = fuzz_record(&cursor, &record->len);
		if (!record->bytes)
			break;
		if (record->len < TUNDP_VNET_LEN) {
			free(record->bytes);
			continue;
		}
		if (choices & MEND)
			fuzz_mend(record->bytes + TUNDP_VNET_LEN, record->len - TUNDP_VNET_LEN);
		count++;
	}
	run(records, count, choices, refusals, false);
	run(records, count, choices, refusals, true);
	for (size_t i = 0; i < count; i++)
		free(records[i].bytes);
	return 0;
}
