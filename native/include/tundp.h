/* The native half of tundp: one public header, read by C and, between the markers, by cffi.
 *
 * Integers are in host order unless a name ends in _be. Nothing here allocates, blocks,
 * prints, exits or keeps state; the caller owns every buffer and table it passes.
 */
#ifndef TUNDP_H
#define TUNDP_H

#include <stddef.h>
#include <stdint.h>

/* cdef-begin */

/* Raised whenever a struct or a meaning below changes; Python refuses another number. */
#define TUNDP_ABI 1

#define TUNDP_FIB_LEVELS 3

/* A FIB as lease/fib.py lays it out. `table` and its length are borrowed from a numpy
 * array that must outlive every call. */
struct tundp_fib {
	uint32_t base;                      /* first address the root covers */
	uint8_t base_len;                   /* prefix length of the root's range, 0..32 */
	uint8_t level_count;                /* 1..TUNDP_FIB_LEVELS */
	uint8_t stride[TUNDP_FIB_LEVELS];   /* address bits each level consumes */
	const uint32_t *table;
	uint64_t table_count;               /* slots in `table` */
};

/* The 16-bit one's-complement sum of `len` bytes (RFC 1071), as a number: what
 * wire/checksum.py's ones_complement_sum gives. An odd last byte is padded with zero. */
uint16_t tundp_sum(const uint8_t *data, size_t len);

/* The header checksum after the TTL is one less (RFC 1624). */
uint16_t tundp_checksum_after_ttl_decrement(uint16_t header_checksum);

/* Whether every lookup stays inside `table`: 0, or -EINVAL. Ask once, before publishing. */
int tundp_fib_check(const struct tundp_fib *fib);

/* Index of the next hop for each of `count` addresses; 0 is "no route". The FIB must have
 * passed tundp_fib_check. */
void tundp_fib_lookup(const struct tundp_fib *fib, const uint32_t *addresses, size_t count,
		      uint32_t *indexes);

/* cdef-end */

#endif
