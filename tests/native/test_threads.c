/* Workers under ThreadSanitizer: two of each engine, that share what they learn, with a socket
 * pair for a TUN and a loopback UDP socket each, while another thread publishes FIBs, forgets
 * what was learnt, reads counters, awaits their heartbeats, and stops them. Prints what failed; exit
 * code 1 then. */
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "tundp_twins.h"

enum {
	PACKETS = 1500,
	FIBS = 150,
	ROUNDS = 8,
	WORKERS = 2,
	HEADERS_LEN = 40,
	PAYLOAD_LEN = 100,
	SUPER_COUNT = 3,
	/* More than a datagram takes: the worker has to learn. */
	BIG_LEN = 65532,
	SPIN_NS = 20000,
	HOPS = 2,
};

struct engine {
	const char *name;
	int (*run)(struct tundp_worker *worker);
	size_t (*len)(void);
	uint32_t offloads;
};

static const struct engine engines[] = {
	{ "simple", tundp_simple_run, tundp_simple_len, 0 },
	{ "mmsg", tundp_batch_run, tundp_batch_len, 0 },
	{ "gso", tundp_batch_run, tundp_batch_len,
	  TUNDP_OFFLOAD_VNET_HEADER | TUNDP_OFFLOAD_UDP_SEGMENT | TUNDP_OFFLOAD_TCP_COALESCE |
		  TUNDP_OFFLOAD_UDP_COALESCE },
};

/* One worker with what is around it. */
struct lab {
	struct tundp_worker *worker;
	struct tundp_worker_config config;
	const struct engine *engine;
	int tun;                /* our end */
	struct sockaddr_in udp; /* its address */
	uint64_t fed;           /* packets it is to have read from the TUN, in all */
	uint64_t sent;          /* packets its hops had counted when last read */
	pthread_t thread;
};

static const struct tundp_hop hops[HOPS] = { { 0 }, { .address = 0x7f000001, .port = 9 } };
static struct tundp_path paths[HOPS];
static uint64_t icmp_full_at_ns[TUNDP_ICMP_LOCAL_BUCKETS + TUNDP_ICMP_WIRE_BUCKETS];
static const uint32_t table[1] = { 1 };
static struct tundp_fib fibs[2];
static uint64_t generation;
static int failures;

static void fail(const struct lab *lab, const char *what)
{
	printf("%s: %s\n", lab->engine->name, what);
	failures++;
}

static void *run(void *lab)
{
	return (void *)(intptr_t)((struct lab *)lab)->engine->run(((struct lab *)lab)->worker);
}

static uint16_t sum_words(uint32_t sum, const uint8_t *data, size_t len)
{
	sum += tundp_sum(data, len);
	return (uint16_t)((sum & 0xffff) + (sum >> 16));
}

static void store16(uint8_t *at, size_t value)
{
	at[0] = (uint8_t)(value >> 8);
	at[1] = (uint8_t)value;
}

/* TCP data, so that it can be split and merged, of `len` bytes in all. */
static void fill(uint8_t *packet, size_t len, uint32_t seq)
{
	const uint8_t pseudo[4] = { 0, 6, (uint8_t)((len - 20) >> 8), (uint8_t)(len - 20) };
	uint16_t sum;

	memset(packet, 0, len);
	packet[0] = 0x45;
	store16(packet + 2, len);
	packet[8] = 9;
	packet[9] = 6;
	memcpy(packet + 12, (uint8_t[]){ 10, 5, 1, 2, 10, 5, 0, 7 }, 8);
	store16(packet + 10, (uint16_t)~tundp_sum(packet, 20));
	store16(packet + 24, seq >> 16);
	store16(packet + 26, seq);
	packet[32] = 0x50;
	packet[33] = 0x10;
	sum = sum_words(tundp_sum(packet + 12, 8), pseudo, 4);
	store16(packet + 36, (uint16_t)~sum_words(sum, packet + 20, len - 20));
}

static uint64_t dropped(const struct tundp_direction *direction)
{
	uint64_t sum = 0;

	for (int i = 0; i < TUNDP_DROP_COUNT; i++)
		sum += direction->drops[i];
	return sum;
}

static int conserved(const struct tundp_direction *direction)
{
	return direction->packets_in == direction->packets_out + dropped(direction);
}

/* What one read of the TUN brings: a packet, now and then a large one, or a super-packet. */
static void feed_tun(struct lab *lab, int number)
{
	static uint8_t frame[TUNDP_VNET_LEN + BIG_LEN];
	const int has_vnet = !!(lab->engine->offloads & TUNDP_OFFLOAD_VNET_HEADER);
	const int is_super = has_vnet && number % 16 == 5;
	const size_t payload_len = is_super ? SUPER_COUNT * PAYLOAD_LEN : PAYLOAD_LEN;
	size_t len = number % 64 == 9 ? BIG_LEN : HEADERS_LEN + payload_len;
	const struct tundp_vnet vnet = {
		.flags = is_super ? TUNDP_VNET_NEEDS_CSUM : 0,
		.gso_type = is_super ? TUNDP_VNET_TCPV4 : TUNDP_VNET_NONE,
		.gso_size = is_super ? PAYLOAD_LEN : 0,
		.csum_start = is_super ? 20 : 0,
		.csum_offset = is_super ? 16 : 0,
	};

	memcpy(frame, &vnet, TUNDP_VNET_LEN);
	fill(frame + TUNDP_VNET_LEN, len, (uint32_t)number * PAYLOAD_LEN);
	len += has_vnet ? TUNDP_VNET_LEN : 0;
	if (write(lab->tun, frame + (has_vnet ? 0 : TUNDP_VNET_LEN), len) != (ssize_t)len)
		fail(lab, "TUN does not take a packet");
	lab->fed += is_super ? SUPER_COUNT : 1;
}

/* Neighbours of one flow, which merge. What does not fit into the socket is lost. */
static void feed_udp(struct lab *lab, int number)
{
	uint8_t packet[HEADERS_LEN + PAYLOAD_LEN];

	for (int i = 0; i < 4; i++) {
		fill(packet, sizeof(packet), (uint32_t)(number * 4 + i) * PAYLOAD_LEN);
		(void)sendto(lab->worker->config.udp_fd, packet, sizeof(packet), MSG_DONTWAIT,
			     (struct sockaddr *)&lab->udp, sizeof(lab->udp));
	}
}

static void drain_tun(const struct lab *lab)
{
	static uint8_t frame[TUNDP_BUFFER_LEN];

	while (recv(lab->tun, frame, sizeof(frame), MSG_DONTWAIT) >= 0)
		;
}

/* The other FIB may be written once all workers were seen with this one. */
static void publish(struct lab *labs)
{
	const struct tundp_fib *now = &fibs[generation & 1];
	struct tundp_fib *next = &fibs[(generation + 1) & 1];

	for (int i = 0; i < WORKERS; i++)
		while (tundp_worker_seen(labs[i].worker) != now->generation)
			sched_yield();
	*next = *now;
	next->generation = ++generation;
	__atomic_store_n(&paths[1].inner_mtu, 0, __ATOMIC_RELAXED);
	__atomic_store_n(&paths[1].no_gso, 0, __ATOMIC_RELAXED);
	for (int i = 0; i < WORKERS; i++) {
		tundp_worker_install(labs[i].worker, next);
		if (tundp_worker_disabled(labs[i].worker))
			fail(&labs[i], "disabled an offload");
		tundp_worker_restore(labs[i].worker);
	}
}

static void read_counters(const struct lab *lab, struct tundp_counters *counters)
{
	tundp_worker_counters(lab->worker, counters);
	if (!conserved(&counters->encap) || !conserved(&counters->decap))
		fail(lab, "not conserved");
}

/* Idle or busy, it makes an iteration when asked to. */
static void await_heartbeat(const struct lab *lab)
{
	const uint64_t before = tundp_worker_heartbeat(lab->worker);

	while (tundp_worker_heartbeat(lab->worker) == before)
		sched_yield();
}

/* What is counted per hop, read while it is written, never goes back. */
static void read_hops(struct lab *lab)
{
	uint64_t sent = 0;

	for (int hop = 0; hop < HOPS; hop++)
		sent += __atomic_load_n(&lab->config.hop_counters[hop].packets_out,
					__ATOMIC_RELAXED);
	if (sent < lab->sent)
		fail(lab, "a hop's counter went back");
	lab->sent = sent;
}

static void finish(struct lab *lab)
{
	struct tundp_counters counters;
	void *code;

	do {
		drain_tun(lab);
		read_counters(lab, &counters);
	} while (counters.encap.packets_in < lab->fed);
	await_heartbeat(lab);
	tundp_worker_stop(lab->worker);
	pthread_join(lab->thread, &code);
	read_counters(lab, &counters);
	if (code)
		fail(lab, "ended with an error");
	if (counters.encap.packets_in != lab->fed)
		fail(lab, "read more than there was");
	read_hops(lab);
	if (lab->sent != counters.encap.packets_out)
		fail(lab, "hops and directions disagree");
	if (!counters.decap.packets_in || !counters.fragments_out)
		fail(lab, "a direction was not tried");
	if (lab->engine->offloads && (!counters.encap.super_in || !counters.encap.super_out))
		fail(lab, "no super-packet was seen");
}

static void round_trip(struct lab *labs)
{
	struct tundp_counters counters;

	for (int i = 0; i < WORKERS; i++) {
		if (tundp_worker_configure(labs[i].worker, &labs[i].config))
			fail(&labs[i], "configuration refused");
		pthread_create(&labs[i].thread, NULL, run, &labs[i]);
	}
	for (int number = 0; number < PACKETS; number++) {
		if (number % (PACKETS / FIBS) == 0) {
			publish(labs);
			for (int i = 0; i < WORKERS; i++)
				await_heartbeat(&labs[i]);
		}
		for (int i = 0; i < WORKERS; i++) {
			feed_tun(&labs[i], number);
			if (number % 4 == 0)
				feed_udp(&labs[i], number);
			drain_tun(&labs[i]);
			read_counters(&labs[i], &counters);
			read_hops(&labs[i]);
		}
	}
	for (int i = 0; i < WORKERS; i++)
		finish(&labs[i]);
}

static int open_lab(struct lab *lab, const struct engine *engine)
{
	struct tundp_worker *worker = malloc(sizeof(*worker));
	socklen_t len = sizeof(lab->udp);
	int pair[2];

	*lab = (struct lab){ .worker = worker, .engine = engine };
	tundp_worker_init(worker);
	/* The TUN's end does not block, ours does. */
	if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) || fcntl(pair[0], F_SETFL, O_NONBLOCK))
		return -1;
	lab->tun = pair[1];
	lab->udp.sin_family = AF_INET;
	lab->udp.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	lab->config = (struct tundp_worker_config){
		.tun_fd = pair[0],
		.udp_fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0),
		.control_fd = eventfd(0, EFD_NONBLOCK),
		.notify_fd = eventfd(0, EFD_NONBLOCK),
		.echo_fd = -1,
		.peer_fd = -1,
		.address = INADDR_LOOPBACK,
		.directions = TUNDP_ENCAP | TUNDP_DECAP,
		.offloads = engine->offloads,
		.max_segments = engine->offloads ? 64 : 1,
		.max_udp_segments = engine->offloads ? 64 : 1,
		.spin_ns = SPIN_NS,
		.memory = aligned_alloc(64, (engine->len() + 63) / 64 * 64),
		.hop_counters = calloc(HOPS, sizeof(struct tundp_hop_counters)),
		.hop_queues = calloc(HOPS, sizeof(struct tundp_hop_queue)),
		.icmp_full_at_ns = icmp_full_at_ns,
	};
	if (!lab->config.memory || !lab->config.hop_counters || !lab->config.hop_queues ||
	    bind(lab->config.udp_fd, (struct sockaddr *)&lab->udp, len) ||
	    tundp_worker_configure(worker, &lab->config))
		return -1;
	tundp_worker_install(worker, &fibs[generation & 1]);
	return getsockname(worker->config.udp_fd, (struct sockaddr *)&lab->udp, &len);
}

static void close_lab(struct lab *lab)
{
	close(lab->tun);
	close(lab->worker->config.tun_fd);
	close(lab->worker->config.udp_fd);
	close(lab->worker->config.control_fd);
	close(lab->worker->config.notify_fd);
	free(lab->config.memory);
	free(lab->config.hop_counters);
	free(lab->config.hop_queues);
	free(lab->worker);
}

int main(void)
{
	fibs[1] = (struct tundp_fib){
		.base_len = 1, .level_count = 1, .table = table, .table_count = 1, .hops = hops,
		.ways = hops,
		.hop_count = 2, .paths = paths, .generation = 1,
	};
	generation = 1;
	if (tundp_fib_check(&fibs[1])) {
		printf("FIB refused\n");
		return 1;
	}
	for (size_t i = 0; i < sizeof(engines) / sizeof(engines[0]); i++) {
		struct lab labs[WORKERS];

		for (int at = 0; at < WORKERS; at++)
			if (open_lab(&labs[at], &engines[i]))
				return 1;
		for (int round = 0; round < ROUNDS; round++)
			round_trip(labs);
		for (int at = 0; at < WORKERS; at++)
			close_lab(&labs[at]);
	}
	return failures ? 1 : 0;
}
