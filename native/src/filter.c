/* A packet filter's program. Its stack of truth values is the bits of a word, the top one the
 * lowest: a sound program never has more of them than instructions. Python twin:
 * tundp/wire/filter_program.py. */
#include <assert.h>
#include <errno.h>

#include "tundp_twins.h"

static_assert(TUNDP_FILTER_OPS_MAX <= 64, "the stack is a word of 64 bits");
static_assert(TUNDP_FIELD_COUNT <= 32, "`present` is a word of 32 bits");

int tundp_filter_check(const struct tundp_filter *filter)
{
	uint32_t depth = 0;

	if (filter->count > TUNDP_FILTER_OPS_MAX)
		return -EINVAL;
	for (uint32_t i = 0; i < filter->count; i++) {
		const struct tundp_filter_op *op = &filter->ops[i];

		switch (op->kind) {
		case TUNDP_OP_TEST:
			if (op->field >= TUNDP_FIELD_COUNT || op->low > op->high)
				return -EINVAL;
			depth++;
			break;
		case TUNDP_OP_NOT:
			if (depth < 1)
				return -EINVAL;
			break;
		case TUNDP_OP_AND:
		case TUNDP_OP_OR:
			if (depth < 2)
				return -EINVAL;
			depth--;
			break;
		default:
			return -EINVAL;
		}
	}
	return depth == (filter->count ? 1 : 0) ? 0 : -EINVAL;
}

int tundp_filter_matches(const struct tundp_filter *filter, const struct tundp_facts *facts)
{
	uint64_t stack = filter->count == 0;

	for (uint32_t i = 0; i < filter->count; i++) {
		const struct tundp_filter_op *op = &filter->ops[i];
		uint32_t value;

		switch (op->kind) {
		case TUNDP_OP_TEST:
			/* Below `low` wraps round to far above `high`. */
			value = (facts->values[op->field] & op->mask) - op->low;
			stack = stack << 1 | (value <= op->high - op->low &&
					      facts->present >> op->field & 1);
			break;
		case TUNDP_OP_NOT:
			stack ^= 1;
			break;
		case TUNDP_OP_AND:
			stack = stack >> 1 & (stack | ~(uint64_t)1);
			break;
		default:
			stack = stack >> 1 | (stack & 1);
			break;
		}
	}
	return (int)(stack & 1);
}
