/* Sums of payload, with a vector unit where there is one. Partial sums are native-order
 * words added up in 64 bits: they add to each other, and sums_fold ends them. A part that
 * another follows must have an even length. */
#ifndef TUNDP_SUMS_H
#define TUNDP_SUMS_H

#include <string.h>

#include "tundp.h"

struct tundp_sums {
	const char *name;
	uint64_t (*sum)(const uint8_t *data, size_t len);
	/* Copies, too. `to` may not overlap `from`. */
	uint64_t (*copy)(uint8_t *to, const uint8_t *from, size_t len);
};

/* The fastest this CPU has. */
const struct tundp_sums *sums_best(void);

uint64_t sums_portable(const uint8_t *data, size_t len);

/* The 16-bit one's-complement sum, in native order. */
static inline uint16_t sums_fold(uint64_t sum)
{
	sum = (sum & 0xffffffffu) + (sum >> 32);
	sum = (sum & 0xffffffffu) + (sum >> 32);
	sum = (sum & 0xffffu) + (sum >> 16);
	sum = (sum & 0xffffu) + (sum >> 16);
	return (uint16_t)sum;
}

/* A 16-bit word as the machine loads it: what sums are made of. */
static inline uint16_t sums_load(const uint8_t *at)
{
	uint16_t word;

	memcpy(&word, at, sizeof(word));
	return word;
}

static inline void sums_store(uint8_t *at, uint16_t word)
{
	memcpy(at, &word, sizeof(word));
}

static inline uint64_t sums_load32(const uint8_t *at)
{
	uint32_t word;

	memcpy(&word, at, sizeof(word));
	return word;
}

#endif
