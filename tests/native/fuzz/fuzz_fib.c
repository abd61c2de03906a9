/* Any numbers as a FIB: tundp_fib_check refuses it, or every lookup stays inside it and finds
 * what a walk bit by bit finds.
 *
 * Input: base (32 bits), its length, levels, three strides, hops (a byte each), then the
 * table, 32 bits a slot, all in big-endian order: what the slots say is also looked up. */
#include "fuzz.h"

enum {
	HEAD_LEN = 10,
	/* A node may be named by many slots, and is checked each time: so much is enough. */
	MAX_BITS = 16,
};

static bool is_too_long(const struct tundp_fib *fib)
{
	unsigned int bits = 0;

	for (unsigned int level = 0; level < fib->level_count && level < TUNDP_FIB_LEVELS; level++) {
		/* Refused at the latest here. */
		if (fib->stride[level] > 31 || (uint64_t)1 << fib->stride[level] > fib->table_count)
			break;
		bits += fib->stride[level];
	}
	return bits > MAX_BITS;
}

static uint32_t walk(const struct tundp_fib *fib, uint32_t address)
{
	unsigned int bit = 0;
	uint64_t node = 0;

	for (; bit < fib->base_len; bit++)
		if ((address ^ fib->base) >> (31 - bit) & 1)
			return 0;
	for (unsigned int level = 0; level < fib->level_count; level++) {
		uint64_t index = 0;
		uint32_t slot;

		for (unsigned int i = 0; i < fib->stride[level]; i++, bit++)
			index = index << 1 | (address >> (31 - bit) & 1);
		REQUIRE(node + index < fib->table_count);
		slot = fib->table[node + index];
		if (slot < 0x80000000u)
			return slot;
		node = slot & 0x7fffffffu;
	}
	return 0;
}

static void look_up(const struct tundp_fib *fib, uint32_t address)
{
	uint32_t index = UINT32_MAX;

	tundp_fib_lookup(fib, &address, 1, &index);
	REQUIRE(index < fib->hop_count);
	REQUIRE(index == walk(fib, address));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct tundp_fib fib = { 0 };
	size_t count, hop_count;
	uint32_t *table;

	if (size < HEAD_LEN)
		return 0;
	hop_count = data[9];
	count = (size - HEAD_LEN) / 4;
	table = malloc(count * sizeof(*table) + !count);
	fib.hops = calloc(hop_count + !hop_count, sizeof(*fib.hops));
	fib.ways = fib.hops;
	fib.paths = calloc(hop_count + !hop_count, sizeof(*fib.paths));
	REQUIRE(table && fib.hops && fib.paths);
	for (size_t i = 0; i < count; i++)
		table[i] = fuzz_be32(data + HEAD_LEN + i * 4);
	fib.base = fuzz_be32(data);
	fib.base_len = data[4];
	fib.level_count = data[5];
	memcpy(fib.stride, data + 6, TUNDP_FIB_LEVELS);
	fib.hop_count = data[9];
	fib.table = table;
	fib.table_count = count;
	if (!is_too_long(&fib) && tundp_fib_check(&fib) == 0) {
		for (size_t i = 0; i < count; i++) {
			look_up(&fib, table[i]);
			look_up(&fib, fib.base ^ (uint32_t)i);
			look_up(&fib, fib.base ^ (table[i] << 1));
		}
		for (unsigned int bit = 0; bit < 32; bit++)
			look_up(&fib, fib.base ^ 1u << bit);
		look_up(&fib, 0);
		look_up(&fib, UINT32_MAX);
	}
	free((void *)(uintptr_t)fib.hops);
	free(fib.paths);
	free(table);
	return 0;
}
