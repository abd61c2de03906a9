/* FIB lookup, inline for the packet path. Python twin: tundp/lease/fib.py. */
#ifndef TUNDP_FIB_H
#define TUNDP_FIB_H

#include <stdbool.h>

#include "tundp.h"

#define FIB_CHUNK 0x80000000u
#define FIB_ADDRESS_BITS 32

static inline uint32_t fib_low_bits(unsigned int count)
{
	return count >= FIB_ADDRESS_BITS ? UINT32_MAX : (1u << count) - 1u;
}

/* Hop id for an address; 0 is "no route". The FIB must be checked. */
static inline uint32_t fib_lookup(const struct tundp_fib *fib, uint32_t address)
{
	unsigned int shift = (unsigned int)(FIB_ADDRESS_BITS - fib->base_len);
	uint64_t offset = 0;

	if ((address ^ fib->base) & ~fib_low_bits(shift))
		return 0;
	for (unsigned int level = 0; level < fib->level_count; level++) {
		uint32_t slot;

		shift -= fib->stride[level];
		slot = fib->table[offset + ((address >> shift) & fib_low_bits(fib->stride[level]))];
		if (!(slot & FIB_CHUNK))
			return slot;
		offset = slot & ~FIB_CHUNK;
	}
	return 0;
}

/* The place of an address in an ascending array, or `count`. */
static inline uint32_t fib_find(const uint32_t *ascending, uint32_t count, uint32_t address)
{
	uint32_t low = 0, high = count;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;

		if (ascending[middle] == address)
			return middle;
		if (ascending[middle] < address)
			low = middle + 1;
		else
			high = middle;
	}
	return count;
}

static inline bool fib_contains(const uint32_t *ascending, uint32_t count, uint32_t address)
{
	return fib_find(ascending, count, address) != count;
}

/* Hop id of the peer with an address, or 0. */
static inline uint32_t fib_hop_of_peer(const struct tundp_fib *fib, uint32_t address)
{
	const uint32_t at = fib_find(fib->peers, fib->peer_count, address);

	return at == fib->peer_count ? 0 : fib->peer_hops[at];
}

/* Whether a hop id means the same endpoint in this FIB. */
static inline bool fib_is_hop(const struct tundp_fib *fib, uint32_t hop,
			      const struct tundp_hop *endpoint)
{
	return hop < fib->hop_count && fib->hops[hop].address == endpoint->address &&
	       fib->hops[hop].port == endpoint->port;
}

/* Bytes of the largest inner packet for a hop, 0 unlimited. */
static inline uint16_t fib_path_mtu(const struct tundp_path *path)
{
	const uint16_t device = __atomic_load_n(&path->inner_mtu, __ATOMIC_RELAXED);
	const uint16_t limit = __atomic_load_n(&path->limit, __ATOMIC_RELAXED);

	return limit && (!device || limit < device) ? limit : device;
}

/* Whether an address is this node's, or lies in its own subnet. */
static inline bool fib_is_own(const struct tundp_fib *fib, uint32_t address)
{
	return fib->hops[fib_lookup(fib, address)].flags & TUNDP_HOP_LOCAL ||
	       fib_contains(fib->own, fib->own_count, address);
}

/* Whether an address is a broadcast address of this host's networks. */
static inline bool fib_is_broadcast(const struct tundp_fib *fib, uint32_t address)
{
	return fib_contains(fib->broadcasts, fib->broadcast_count, address);
}

/* Whether an address is one of this host's, or a peer's PublicIP. */
static inline bool fib_is_node(const struct tundp_fib *fib, uint32_t address)
{
	return fib_contains(fib->own, fib->own_count, address) ||
	       fib_contains(fib->peers, fib->peer_count, address);
}

/* Hop id of who sends what has this inner source: of an address in a lease the lease's hop, of a
 * peer's PublicIP that peer's; or 0. */
static inline uint32_t fib_holder(const struct tundp_fib *fib, uint32_t inner_source)
{
	const uint32_t hop = fib_lookup(fib, inner_source);

	return hop ? hop : fib_hop_of_peer(fib, inner_source);
}

#endif
