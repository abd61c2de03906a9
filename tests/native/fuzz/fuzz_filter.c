/* Any bytes as a filter's program, and as a packet: no read past the packet, facts that are what
 * its bytes say, and what a program that is accepted comes to as a tree.
 *
 * Input: a count, as many instructions of 14 bytes (kind, field, then low, high and mask in
 * big-endian order), then the packet. The count's top bit says that it was dropped, and by whom
 * it was sent. */
#include "fuzz.h"

enum {
	OP_LEN = 14,
	IS_DROPPED = 0x80,
};

static bool has(const struct tundp_facts *facts, uint32_t field)
{
	return facts->present >> field & 1;
}

/* The value of the expression whose last instruction is before `*at`. */
static bool value_of(const struct tundp_filter *filter, const struct tundp_facts *facts,
		     uint32_t *at)
{
	const struct tundp_filter_op *op;
	bool right, left;
	uint32_t value;

	REQUIRE(*at > 0);
	op = &filter->ops[--*at];
	if (op->kind == TUNDP_OP_TEST) {
		REQUIRE(op->field < TUNDP_FIELD_COUNT);
		value = facts->values[op->field] & op->mask;
		return has(facts, op->field) && op->low <= value && value <= op->high;
	}
	right = value_of(filter, facts, at);
	if (op->kind == TUNDP_OP_NOT)
		return !right;
	left = value_of(filter, facts, at);
	REQUIRE(op->kind == TUNDP_OP_AND || op->kind == TUNDP_OP_OR);
	return op->kind == TUNDP_OP_AND ? left && right : left || right;
}

static void require_facts(const struct tundp_facts *facts, const uint8_t *packet, size_t size)
{
	const bool is_ip = size >= 20 && packet[0] >> 4 == 4;
	const bool has_quote = has(facts, TUNDP_FIELD_QUOTED_SOURCE);

	REQUIRE(facts->present >> TUNDP_FIELD_COUNT == 0);
	for (uint32_t field = 0; field < TUNDP_FIELD_COUNT; field++)
		REQUIRE(has(facts, field) || facts->values[field] == 0);
	REQUIRE(facts->values[TUNDP_FIELD_LENGTH] == size);
	REQUIRE(has(facts, TUNDP_FIELD_SOURCE) == is_ip);
	REQUIRE(has(facts, TUNDP_FIELD_PROTOCOL) == is_ip);
	REQUIRE(has(facts, TUNDP_FIELD_FRAGMENT) == is_ip);
	REQUIRE(has(facts, TUNDP_FIELD_SOURCE_PORT) == has(facts, TUNDP_FIELD_DESTINATION_PORT));
	if (!is_ip) {
		REQUIRE(!has_quote && !has(facts, TUNDP_FIELD_SOURCE_PORT));
		return;
	}
	REQUIRE(facts->values[TUNDP_FIELD_SOURCE] == fuzz_be32(packet + 12));
	REQUIRE(facts->values[TUNDP_FIELD_DESTINATION] == fuzz_be32(packet + 16));
	if (has(facts, TUNDP_FIELD_SOURCE_PORT)) {
		REQUIRE(fuzz_ip_header_len(packet) + 4 <= size);
		REQUIRE(facts->values[TUNDP_FIELD_DESTINATION_PORT] ==
			fuzz_be16(packet + fuzz_ip_header_len(packet) + 2));
	}
	if (has_quote) {
		REQUIRE(packet[9] == 1 && fuzz_ip_header_len(packet) + 28 <= size);
		REQUIRE(facts->values[TUNDP_FIELD_QUOTED_SOURCE] ==
			fuzz_be32(packet + fuzz_ip_header_len(packet) + 20));
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct tundp_filter filter = { 0 };
	struct tundp_facts facts;
	uint8_t choices, *packet;
	uint32_t at;

	if (size < 1)
		return 0;
	choices = *data++;
	size--;
	filter.count = choices & 0x7f;
	for (at = 0; at < filter.count && at < TUNDP_FILTER_OPS_MAX && size >= OP_LEN; at++) {
		filter.ops[at] = (struct tundp_filter_op){
			.kind = data[0],
			.field = data[1],
			.low = fuzz_be32(data + 2),
			.high = fuzz_be32(data + 6),
			.mask = fuzz_be32(data + 10),
		};
		data += OP_LEN;
		size -= OP_LEN;
	}
	packet = fuzz_copy(data, size);
	memset(&facts, 0xa5, sizeof(facts));
	tundp_facts_of(packet, size, (uint32_t)size, &facts);
	require_facts(&facts, packet, size);
	tundp_facts_event(&facts, choices & IS_DROPPED ? TUNDP_DECAP : TUNDP_ENCAP,
			  choices & IS_DROPPED ? FUZZ_LOOPBACK : 0, choices & IS_DROPPED, 7);
	REQUIRE(has(&facts, TUNDP_FIELD_REASON) == !!(choices & IS_DROPPED));
	REQUIRE(has(&facts, TUNDP_FIELD_OUTER) == !!(choices & IS_DROPPED));
	if (tundp_filter_check(&filter) == 0) {
		const int matches = tundp_filter_matches(&filter, &facts);

		REQUIRE(filter.count <= TUNDP_FILTER_OPS_MAX);
		at = filter.count;
		REQUIRE(matches == (filter.count ? value_of(&filter, &facts, &at) : 1));
		REQUIRE(at == 0);
	}
	free(packet);
	return 0;
}
