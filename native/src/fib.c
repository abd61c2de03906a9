/* Checking a FIB before it is used. Python twin: tundp/lease/fib.py, which also builds the table
 * and describes its layout. */
#include <errno.h>

#include "fib.h"

/* Walks the table as a lookup would: every slot of the root, then every chunk it names. */
static int check_node(const struct tundp_fib *fib, unsigned int level, uint64_t offset)
{
	uint64_t count = (uint64_t)1 << fib->stride[level];

	if (offset > fib->table_count || count > fib->table_count - offset)
		return -EINVAL;
	for (uint64_t at = offset; at < offset + count; at++) {
		uint32_t slot = fib->table[at];

		if (!(slot & FIB_CHUNK)) {
			if (slot >= fib->hop_count)
				return -EINVAL;
			continue;
		}
		/* Chunks lie behind the node that names them, never inside it. */
		if (level + 1 >= fib->level_count || (slot & ~FIB_CHUNK) < offset + count ||
		    check_node(fib, level + 1, slot & ~FIB_CHUNK))
			return -EINVAL;
	}
	return 0;
}

int tundp_fib_check(const struct tundp_fib *fib)
{
	unsigned int bits = fib->base_len;

	if (!fib->table || !fib->hops || !fib->ways || !fib->paths)
		return -EINVAL;
	if ((fib->peer_count && (!fib->peers || !fib->peer_hops)) ||
	    (fib->own_count && !fib->own) || (fib->broadcast_count && !fib->broadcasts))
		return -EINVAL;
	if (fib->hop_count > TUNDP_HOPS_MAX)
		return -EINVAL;
	for (uint32_t at = 0; at < fib->peer_count; at++)
		if (fib->peer_hops[at] >= fib->hop_count)
			return -EINVAL;
	if (fib->level_count < 1 || fib->level_count > TUNDP_FIB_LEVELS)
		return -EINVAL;
	for (unsigned int level = 0; level < fib->level_count; level++)
		bits += fib->stride[level];
	/* A lookup shifts by what is left of the address behind each level. */
	if (bits > FIB_ADDRESS_BITS || (fib->base_len == 0 && fib->stride[0] == 0))
		return -EINVAL;
	return check_node(fib, 0, 0);
}
