/* The pure C files under AddressSanitizer and UndefinedBehaviorSanitizer: every length and
 * alignment of a sum in a buffer that ends exactly where the data does, and lookups over
 * whole and broken tables. Prints what failed; exit code 1 then. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tundp.h"

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
static uint16_t inner_mtu[16];
static uint8_t single[16];
static const uint32_t peers[] = { 0xc0000207, 0xc0000208 };

static struct tundp_fib make_fib(uint32_t *table, size_t count)
{
	struct tundp_fib fib = {
		.base = 0x0a050000, .base_len = 30, .level_count = 2, .stride = { 1, 1 },
		.table = table, .table_count = count,
		.hops = hops, .hop_count = 16, .inner_mtu = inner_mtu, .single = single,
		.peers = peers, .peer_count = 2, .own = peers + 1, .own_count = 1,
	};

	for (size_t i = 0; i < 16; i++)
		inner_mtu[i] = i == 8 ? 100 : 0xffff;
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
	static const struct tundp_rules rules = { .tunnel_address = 0x0a050001,
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
			tundp_encapsulate(&fib, &rules, packet, len, &verdict);
			if (verdict.kind == TUNDP_FORWARD && verdict.fragment_mtu)
				while ((piece = tundp_fragment(packet, verdict.fragment_mtu, taken, out,
							       &out_len)))
					taken += piece;
		} else {
			tundp_decapsulate(&fib, &rules, packet, len, peers[rng() % 2], &verdict);
		}
		CHECK(verdict.kind <= TUNDP_DROP);
		seen[verdict.kind & 3]++;
		free(packet);
	}
	for (int kind = 0; kind < 4; kind++)
		CHECK(seen[kind] > 100);
}

int main(void)
{
	test_any_bytes();
	test_sums();
	test_ttl();
	test_fib();
	return failures ? 1 : 0;
}
