/* Partial sums for the Internet checksum (RFC 1071): native-order 16-bit words added up in 64
 * bits. They add to each other, and sums_fold ends them. Partial sums may be added only if every
 * part but the last has even length. Header-only but for the sums over payload, which use a
 * vector unit where there is one (checksum.c). */
#ifndef TUNDP_SUMS_H
#define TUNDP_SUMS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct tundp_sums {
	const char *name;
	uint64_t (*sum)(const uint8_t *data, size_t len);
	/* Copies, too. `to` may not overlap `from`. */
	uint64_t (*copy)(uint8_t *to, const uint8_t *from, size_t len);
};

/* The fastest this CPU has. */
const struct tundp_sums *sums_best(void);

/* The variant of that number, fastest first, or NULL. */
const struct tundp_sums *sums_variant(size_t number);

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

/* The sum of `len` bytes, a multiple of 4: a header's. */
static inline uint64_t sums_words(const uint8_t *data, size_t len)
{
	uint64_t sum = 0;

	for (size_t at = 0; at < len; at += 4)
		sum += sums_load32(data + at);
	return sum;
}

#endif
