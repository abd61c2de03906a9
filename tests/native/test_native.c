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
	struct tundp_fib fib = {
		.base = 0x0a050000, .base_len = 30, .level_count = 2, .stride = { 1, 1 },
		.table = table, .table_count = count,
	};

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
	table[1] = 1;
	table[3] = 0x80000000u | 2; /* unreachable: nobody reads it */
	CHECK(tundp_fib_check(&fib) == 0);
	fib.table = NULL;
	CHECK(tundp_fib_check(&fib) != 0);
	free(table);

	/* A root over all 32 bits' worth of prefix 0: shifts by 32 must not happen. */
	table = calloc(2, sizeof(*table));
	table[1] = 9;
	fib = (struct tundp_fib){ .base_len = 0, .level_count = 1, .stride = { 1 },
				  .table = table, .table_count = 2 };
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

int main(void)
{
	test_sums();
	test_ttl();
	test_fib();
	return failures ? 1 : 0;
}
