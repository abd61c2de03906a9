/* The pure C files under AddressSanitizer and UndefinedBehaviorSanitizer, and on machines of
 * the other byte order: every length and alignment of a sum in a buffer that ends exactly
 * where the data does, lookups over whole and broken tables, and super-packets taken apart
 * and put together again. Prints what failed; exit code 1 then. */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../native/src/count.h"
#include "tundp_twins.h"

static int failures;

#define CHECK(condition)                                                          \
	do {                                                                      \
		if (!(condition)) {                                               \
			printf("%s:%d: %s\n", __FILE__, __LINE__, #condition);    \
			failures++;                                               \
		}                                                                 \
	} while (0)

/* RFC 1071, written the slow way and on its own. */
static uint16_t slow_sum(const uint8_t *data, size_t len)
{
	uint32_t sum = 0;

	for (size_t i = 0; i < len; i++) {
		sum += (i & 1) ? data[i] : (uint32_t)data[i] << 8;
		sum = (sum & 0xffff) + (sum >> 16);
	}
	return (uint16_t)sum;
}

static void test_sums(void)
{
	for (size_t len = 0; len < 300; len++) {
		for (size_t offset = 0; offset < 8; offset++) {
			uint8_t *block = malloc(offset + len + !len);

			for (size_t i = 0; i < offset + len; i++)
				block[i] = (uint8_t)(i * 167 + len);
			CHECK(tundp_sum(block + offset, len) == slow_sum(block + offset, len));
			memset(block, 0xff, offset + len);
			CHECK(tundp_sum(block + offset, len) == slow_sum(block + offset, len));
			free(block);
		}
	}
}

/* Each way this CPU has to sum, not only the one it prefers. */
static void test_sums_variants(void)
{
	size_t count = 0;

	CHECK(tundp_sums_name(0) != NULL);
	while (tundp_sums_name(count))
		count++;
	CHECK(count <= TUNDP_SUMS_MAX);
	CHECK(!strcmp(tundp_sums_name(count - 1), "portable"));
	for (size_t len = 0; len <= 600; len++) {
		for (size_t offset = 0; offset < 8; offset++) {
			uint8_t *from = malloc(offset + len + !len);
			/* Aligned otherwise than what is copied. */
			uint8_t *to = malloc((offset ^ 5) + len + !len);
			const size_t to_offset = offset ^ 5;

			for (size_t i = 0; i < offset + len; i++)
				from[i] = len & 1 ? (uint8_t)(i * 167 + len) : 0xff;
			for (size_t variant = 0; variant < count; variant++) {
				const uint16_t sum = slow_sum(from + offset, len);

				CHECK(tundp_sums_run(variant, NULL, from + offset, len) == sum);
				memset(to, 0xa5, to_offset + len);
				CHECK(tundp_sums_run(variant, to + to_offset, from + offset,
						     len) == sum);
				CHECK(!memcmp(to + to_offset, from + offset, len));
				CHECK(to_offset == 0 || to[to_offset - 1] == 0xa5);
			}
			free(to);
			free(from);
		}
	}
}

static void test_ttl(void)
{
	static const uint16_t vectors[][2] = {
		{ 0xfe00, 0xff00 }, { 0xfeff, 0x0000 }, { 0xff00, 0x0001 },
		{ 0xff12, 0x0013 }, { 0xffff, 0x0100 }, { 0x0000, 0x0100 },
	};

	for (size_t i = 0; i < sizeof(vectors) / sizeof(vectors[0]); i++)
		CHECK(tundp_checksum_after_ttl_decrement(vectors[i][0]) == vectors[i][1]);
}

static const struct tundp_hop hops[16] = {
	[7] = { .address = 0xc0000207, .port = 8285 },
	[8] = { .address = 0xc0000208, .port = 8285 },
	[9] = { .address = 0, .port = 8285, .flags = TUNDP_HOP_LOCAL },
};
static struct tundp_path paths[16];
static const uint32_t peers[] = { 0xc0000207, 0xc0000208 };
static const uint32_t peer_hops[] = { 7, 8 };

static struct tundp_fib make_fib(uint32_t *table, size_t count)
{
	struct tundp_fib fib = {
		.base = 0x0a050000, .base_len = 30, .level_count = 2, .stride = { 1, 1 },
		.table = table, .table_count = count,
		.hops = hops, .ways = hops, .hop_count = 16, .paths = paths,
		.peers = peers, .peer_hops = peer_hops, .peer_count = 2, .own = peers + 1, .own_count = 1,
	};

	for (size_t i = 0; i < 16; i++)
		paths[i].inner_mtu = i == 8 ? 100 : 0;
	return fib;
}

static uint32_t look_up(const struct tundp_fib *fib, uint32_t address)
{
	uint32_t index;

	tundp_fib_lookup(fib, &address, 1, &index);
	return index;
}

static void test_fib(void)
{
	/* 10.5.0.0/30 in two levels of one bit; the second slot of the root is refined. */
	const size_t count = 4;
	uint32_t *table = malloc(count * sizeof(*table));
	struct tundp_fib fib = make_fib(table, count);

	table[0] = 7;
	table[1] = 0x80000000u | 2;
	table[2] = 8;
	table[3] = 0;
	CHECK(tundp_fib_check(&fib) == 0);
	CHECK(look_up(&fib, 0x0a050000) == 7);
	CHECK(look_up(&fib, 0x0a050001) == 7);
	CHECK(look_up(&fib, 0x0a050002) == 8);
	CHECK(look_up(&fib, 0x0a050003) == 0);
	CHECK(look_up(&fib, 0x0a050004) == 0);
	CHECK(look_up(&fib, 0xffffffff) == 0);

	table[1] = 0x80000000u | 3; /* reaches past the end */
	CHECK(tundp_fib_check(&fib) != 0);
	table[1] = 0x80000000u; /* a loop */
	CHECK(tundp_fib_check(&fib) != 0);
	table[1] = 0xffffffffu;
	CHECK(tundp_fib_check(&fib) != 0);
	table[1] = 16; /* no such hop */
	CHECK(tundp_fib_check(&fib) != 0);
	table[1] = 1;
	table[3] = 0x80000000u | 2; /* unreachable: nobody reads it */
	CHECK(tundp_fib_check(&fib) == 0);
	fib.table = NULL;
	CHECK(tundp_fib_check(&fib) != 0);
	free(table);

	/* A root over all 32 bits' worth of prefix 0: shifts by 32 must not happen. */
	table = calloc(2, sizeof(*table));
	table[1] = 9;
	fib = make_fib(table, 2);
	fib.base = 0;
	fib.base_len = 0;
	fib.level_count = 1;
	CHECK(tundp_fib_check(&fib) == 0);
	CHECK(look_up(&fib, 0x7fffffff) == 0);
	CHECK(look_up(&fib, 0x80000000) == 9);
	fib.base_len = 32;
	fib.stride[0] = 0;
	table[0] = 5;
	CHECK(tundp_fib_check(&fib) == 0);
	CHECK(look_up(&fib, 0) == 5);
	CHECK(look_up(&fib, 1) == 0);
	free(table);
}

static uint32_t rng_state = 1;

static uint32_t rng(void)
{
	rng_state = rng_state * 1664525u + 1013904223u;
	return rng_state >> 8;
}

/* Any bytes through both directions, in blocks that end where the packet does. Half of them
 * get a valid header first, or nothing would get past the checksum. */
static void test_any_bytes(void)
{
	static const struct tundp_policy policy = { .tun_address = 0x0a050001,
						  .source_check = TUNDP_SOURCE_COUNT };
	uint32_t table[4] = { 7, 0x80000000u | 2, 8, 9 };
	const struct tundp_fib fib = make_fib(table, 4);
	struct tundp_verdict verdict;
	unsigned int seen[4] = { 0 };

	CHECK(tundp_fib_check(&fib) == 0);
	for (int round = 0; round < 200000; round++) {
		size_t len = rng() % 200;
		uint8_t *packet = malloc(len + !len);
		uint8_t out[200];
		size_t out_len, taken = 0, piece;

		for (size_t i = 0; i < len; i++)
			packet[i] = (uint8_t)rng();
		if (round & 1 && len >= 20) {
			uint16_t sum;

			packet[0] = (uint8_t)(0x45 + rng() % 3);
			packet[2] = 0;
			packet[3] = (uint8_t)len;
			packet[6] &= 0x40;
			packet[7] = 0;
			memcpy(packet + 16, (uint8_t[]){ 10, 5, 0, (uint8_t)(rng() % 5) }, 4);
			packet[10] = packet[11] = 0;
			if ((size_t)(packet[0] & 15) * 4 <= len) {
				sum = (uint16_t)~tundp_sum(packet, (size_t)(packet[0] & 15) * 4);
				packet[10] = (uint8_t)(sum >> 8);
				packet[11] = (uint8_t)sum;
			}
		}
		if (round & 2) {
			tundp_encapsulate(&fib, &policy, packet, len, &verdict);
			if (verdict.kind == TUNDP_FORWARD && verdict.fragment_mtu)
				while ((piece = tundp_fragment(packet, verdict.fragment_mtu, taken, out,
							       &out_len)))
					taken += piece;
		} else {
			tundp_decapsulate(&fib, &policy, packet, len, peers[rng() % 2], 8285, &verdict);
		}
		CHECK(verdict.kind <= TUNDP_DROP);
		seen[verdict.kind & 3]++;
		free(packet);
	}
	for (int kind = 0; kind < 4; kind++)
		CHECK(seen[kind] > 100);
}

static uint32_t get(const uint8_t *at, size_t len)
{
	uint32_t value = 0;

	while (len--)
		value = value << 8 | *at++;
	return value;
}

static void put(uint8_t *at, uint32_t value, size_t len)
{
	while (len--) {
		at[len] = (uint8_t)value;
		value >>= 8;
	}
}

/* From a peer's subnet and its address, to each kind of destination, in each mode. */
static void test_destination_check(void)
{
	static const struct {
		uint32_t address;
		int is_own;
	} destinations[] = {
		{ 0x0a050003, 1 }, /* our subnet */
		{ 0xc0000208, 1 }, /* another address of ours */
		{ 0x0a050002, 0 }, /* a peer's subnet */
		{ 0x0a050004, 0 }, /* no route */
	};
	uint32_t table[4] = { 7, 0x80000000u | 2, 8, 9 };
	const struct tundp_fib fib = make_fib(table, 4);
	struct tundp_verdict verdict;

	for (uint32_t check = TUNDP_SOURCE_OFF; check <= TUNDP_SOURCE_ENFORCE; check++)
		for (size_t i = 0; i < sizeof(destinations) / sizeof(destinations[0]); i++) {
			const struct tundp_policy policy = { .source_check = check };
			const int is_own = destinations[i].is_own;
			uint8_t packet[20] = { 0x45, 0, 0, 20, [8] = 9, [9] = 253,
					       [12] = 10, 5, 0, 1 };

			put(packet + 16, destinations[i].address, 4);
			put(packet + 10, (uint16_t)~tundp_sum(packet, 20), 2);
			tundp_decapsulate(&fib, &policy, packet, 20, 0xc0000207, 8285, &verdict);
			if (check == TUNDP_SOURCE_ENFORCE && !is_own) {
				CHECK(verdict.kind == TUNDP_DROP);
				CHECK(verdict.reason == TUNDP_DROP_DESTINATION_MISMATCH);
				continue;
			}
			CHECK(verdict.kind == TUNDP_DELIVER);
			CHECK(verdict.source_matches == 1);
			CHECK(verdict.destination_matches ==
			      (uint32_t)(is_own || check == TUNDP_SOURCE_OFF));
		}
}

/* Of a whole packet, pseudo-header included: 0xffff when its checksum is right. */
static uint16_t slow_transport_sum(const uint8_t *packet, size_t len)
{
	uint8_t *block = calloc(1, 12 + len);
	uint16_t sum;

	memcpy(block, packet + 12, 8);
	block[9] = packet[9];
	put(block + 10, (uint32_t)len - 20, 2);
	memcpy(block + 12, packet + 20, len - 20);
	sum = slow_sum(block, 12 + len - 20);
	free(block);
	return sum;
}

enum {
	GSO_SIZE = 100,
	LAST_LEN = 33, /* odd, and shorter than the others */
	PIECES = 4,
	PAYLOAD_LEN = (PIECES - 1) * GSO_SIZE + LAST_LEN,
	TCP_HEADERS_LEN = 20 + 32,
	UDP_HEADERS_LEN = 20 + 8,
	ROOM = 65536,
};

/* A super-packet as a stack writes it: no checksum but the pseudo-header's. */
static size_t make_super(uint8_t *packet, bool is_tcp)
{
	static const uint8_t timestamps[] = { 1, 1, 8, 10, 0, 1, 2, 3, 4, 5, 6, 7 };
	const size_t headers_len = is_tcp ? TCP_HEADERS_LEN : UDP_HEADERS_LEN;
	const size_t len = headers_len + PAYLOAD_LEN;
	uint8_t *transport = packet + 20;
	uint8_t pseudo[12] = { 0 };

	memset(packet, 0, headers_len);
	packet[0] = 0x45;
	packet[1] = 0x02; /* ECT(0) */
	put(packet + 2, (uint32_t)len, 2);
	put(packet + 4, 0xfffe, 2); /* the ID wraps on the way */
	packet[8] = 64;
	packet[9] = is_tcp ? 6 : 17;
	memcpy(packet + 12, (uint8_t[]){ 10, 5, 1, 2, 10, 5, 0, 7 }, 8);
	put(packet + 10, (uint16_t)~slow_sum(packet, 20), 2);
	put(transport, 40000, 2);
	put(transport + 2, 5201, 2);
	if (is_tcp) {
		put(transport + 4, 0xffffff80, 4); /* and so does the sequence number */
		put(transport + 8, 7777, 4);
		transport[12] = 0x80;
		transport[13] = 0x10 | 0x08 | 0x01; /* ACK, PSH, FIN */
		put(transport + 14, 502, 2);
		memcpy(transport + 20, timestamps, sizeof(timestamps));
	} else {
		put(transport + 4, 8 + PAYLOAD_LEN, 2);
	}
	memcpy(pseudo, packet + 12, 8);
	pseudo[9] = packet[9];
	put(pseudo + 10, (uint32_t)len - 20, 2);
	put(transport + (is_tcp ? 16 : 6), slow_sum(pseudo, 12), 2);
	for (size_t i = 0; i < PAYLOAD_LEN; i++)
		packet[headers_len + i] = (uint8_t)(i * 31 + 7);
	return len;
}

static void check_piece(const uint8_t *piece, size_t len, const uint8_t *super, size_t number)
{
	const bool is_tcp = super[9] == 6;
	const size_t headers_len = is_tcp ? TCP_HEADERS_LEN : UDP_HEADERS_LEN;
	const bool is_last = number == PIECES - 1;
	const uint8_t *transport = piece + 20;

	CHECK(len == headers_len + (is_last ? LAST_LEN : GSO_SIZE));
	CHECK(piece[0] == 0x45 && piece[1] == 0x02);
	CHECK(get(piece + 2, 2) == len);
	CHECK(get(piece + 4, 2) == ((0xfffe + number) & 0xffff));
	CHECK(get(piece + 6, 2) == 0);
	CHECK(piece[8] == 63 && piece[9] == super[9]);
	CHECK(slow_sum(piece, 20) == 0xffff);
	CHECK(!memcmp(piece + 12, super + 12, 8 + 4)); /* addresses and ports */
	if (is_tcp) {
		CHECK(get(transport + 4, 4) ==
		      (uint32_t)(0xffffff80u + (uint32_t)number * GSO_SIZE));
		CHECK(get(transport + 8, 4) == 7777 && transport[12] == 0x80);
		CHECK(transport[13] == (is_last ? 0x19 : 0x10));
		CHECK(get(transport + 14, 2) == 502 && get(transport + 18, 2) == 0);
		CHECK(!memcmp(transport + 20, super + 40, 12));
	} else {
		CHECK(get(transport + 4, 2) == len - 20);
	}
	CHECK(slow_transport_sum(piece, len) == 0xffff);
	CHECK(!memcmp(piece + headers_len, super + headers_len + number * GSO_SIZE,
		      len - headers_len));
}

/* A super-packet in pieces, and the pieces in a super-packet, byte for byte: what came is what
 * goes, but for the TTL and, of TCP, FIN, which is never merged. */
static void test_super_packets(bool is_tcp)
{
	static uint8_t packets[PIECES * (TUNDP_VNET_LEN + 200)];
	const size_t headers_len = is_tcp ? TCP_HEADERS_LEN : UDP_HEADERS_LEN;
	const struct tundp_vnet vnet = {
		.flags = TUNDP_VNET_NEEDS_CSUM,
		.gso_type = is_tcp ? TUNDP_VNET_TCPV4 : TUNDP_VNET_UDP_L4,
		.hdr_len = (uint16_t)headers_len,
		.gso_size = GSO_SIZE,
		.csum_start = 20,
		.csum_offset = is_tcp ? 16 : 6,
	};
	uint8_t *super = malloc(headers_len + PAYLOAD_LEN);
	const size_t len = make_super(super, is_tcp);
	const size_t room = len + PIECES * 120;
	uint8_t *out = malloc(room), *at = out, *in = packets;
	uint8_t *scratch = malloc(TUNDP_COALESCE_SCRATCH);
	uint64_t misses[TUNDP_MISS_COUNT] = { 0 };
	uint32_t lens[PIECES], head[2];
	const struct tundp_coalesce_input input = { .packets = packets,
						    .lens = lens,
						    .count = PIECES,
						    .is_tcp_on = 1,
						    .is_udp_on = 1,
						    .max_udp_segments = 64 };
	struct tundp_vnet made;
	int64_t used;

	CHECK(tundp_segment(&vnet, super, len, 1, out, room, lens, PIECES - 1) == INT64_MIN);
	CHECK(tundp_segment(&vnet, super, len, 1, out, room - 1, lens, PIECES) == INT64_MIN);
	CHECK(tundp_segment(&vnet, super, len, 1, out, room, lens, PIECES) == PIECES);
	for (size_t i = 0; i < PIECES; at += lens[i++]) {
		check_piece(at, lens[i], super, i);
		in += TUNDP_VNET_LEN;
		memcpy(in, at, lens[i]);
		if (is_tcp && i == PIECES - 1) {
			/* Without its FIN, and the checksum that goes with it. */
			const uint32_t sum = get(in + 36, 2) + 1;

			in[33] &= 0xfe;
			put(in + 36, (sum & 0xffff) + (sum >> 16), 2);
			CHECK(slow_transport_sum(in, lens[i]) == 0xffff);
		}
		in += lens[i];
	}
	free(out);

	out = malloc(ROOM);
	used = tundp_coalesce(&input, scratch, out, ROOM, misses);
	CHECK(used == (int64_t)(sizeof(head) + TUNDP_VNET_LEN + len));
	memcpy(head, out, sizeof(head));
	memcpy(&made, out + sizeof(head), sizeof(made));
	at = out + sizeof(head) + TUNDP_VNET_LEN;
	CHECK(head[0] == PIECES && head[1] == len);
	CHECK(!memcmp(&made, &vnet, sizeof(made)));
	super[8] = 63;
	if (is_tcp)
		super[33] &= 0xfe;
	put(super + 10, 0, 2);
	put(super + 10, (uint16_t)~slow_sum(super, 20), 2);
	CHECK(!memcmp(at, super, len));
	for (int i = 0; i < TUNDP_MISS_COUNT; i++)
		CHECK(misses[i] == 0);
	/* Too little room is said, not overrun. */
	CHECK(tundp_coalesce(&input, scratch, out, (size_t)used - 1, misses) == -1);
	free(out);
	free(scratch);
	free(super);
}

/* SO_RXQ_OVFL counts modulo 2^32, and from zero for a new socket: ours never goes back. */
static void report_overflows(struct tundp_worker *worker, uint32_t drops)
{
	union {
		struct cmsghdr header;
		uint8_t bytes[CMSG_SPACE(sizeof(drops))];
	} control = { .header = { .cmsg_len = CMSG_LEN(sizeof(drops)),
				  .cmsg_level = SOL_SOCKET,
				  .cmsg_type = SO_RXQ_OVFL } };

	memcpy(CMSG_DATA(&control.header), &drops, sizeof(drops));
	count_overflows(worker, &control.header);
}

static void test_overflows(void)
{
	struct tundp_worker *worker = malloc(sizeof(*worker));

	tundp_worker_init(worker);
	report_overflows(worker, 10);
	CHECK(worker->counters.socket_overflows == 10);
	report_overflows(worker, UINT32_MAX);
	CHECK(worker->counters.socket_overflows == UINT32_MAX);
	report_overflows(worker, 5);
	CHECK(worker->counters.socket_overflows == UINT32_MAX + UINT64_C(6));
	tundp_worker_rebound(worker);
	report_overflows(worker, 4);
	CHECK(worker->counters.socket_overflows == UINT32_MAX + UINT64_C(10));
	free(worker);
}

/* A packet that was forwarded, then found too long: what tundp_encapsulate would have said. */
static void test_narrow(void)
{
	const struct tundp_policy policy = { .tun_address = 0x0a050001 };
	uint32_t table[] = { 8, 8, 8, 8 };
	struct tundp_fib fib = make_fib(table, 4);
	uint8_t original[200], forwarded[200];

	for (int is_df = 0; is_df < 2; is_df++)
		for (uint16_t mtu = 68; mtu < 220; mtu = (uint16_t)(mtu + 19)) {
			struct tundp_verdict before, after;

			memset(original, 7, sizeof(original));
			memcpy(original, (uint8_t[]){ 0x45, 0, 0, 200, 0, 1, is_df ? 0x40 : 0, 0, 64,
						      17, 0, 0, 192, 0, 2, 9, 10, 5, 0, 1 },
			       20);
			put(original + 10, (uint16_t)~slow_sum(original, 20), 2);
			memcpy(forwarded, original, sizeof(original));
			paths[8].inner_mtu = 0;
			tundp_encapsulate(&fib, &policy, forwarded, 200, &before);
			CHECK(before.kind == TUNDP_FORWARD && forwarded[8] == 63);
			tundp_narrow(&policy, forwarded, 8, mtu, &after);
			paths[8].inner_mtu = mtu;
			tundp_encapsulate(&fib, &policy, original, 200, &before);
			CHECK(after.kind == before.kind && after.hop == before.hop);
			if (after.kind == TUNDP_FORWARD) {
				CHECK(after.len == before.len);
				CHECK(after.fragment_mtu == before.fragment_mtu);
				CHECK(!memcmp(forwarded, original, sizeof(original)));
				continue;
			}
			CHECK(after.reason == before.reason && after.reply_len == before.reply_len);
			CHECK(!memcmp(after.reply, before.reply, after.reply_len));
		}
}

int main(void)
{
	test_sums_variants();
	test_super_packets(true);
	test_super_packets(false);
	test_any_bytes();
	test_destination_check();
	test_sums();
	test_ttl();
	test_narrow();
	test_overflows();
	test_fib();
	return failures ? 1 : 0;
}
