/* Any bytes as a datagram from the underlay: the verdict, and with it the packet, must be
 * sound.
 *
 * Input: a byte of choices (0x01 mend the packet, 0x06 the source check, 0x18 who sent it),
 * then the datagram. */
#include "fuzz.h"

/* By fuzz.h's words, not by its table. */
static bool is_own(uint32_t address)
{
	return address == FUZZ_TUNNEL || address == FUZZ_OWN;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const uint32_t sources[4] = { FUZZ_LOOPBACK, FUZZ_PEER, 0xc6336401, 0 };
	const struct tundp_fib *fib = fuzz_fib(100);
	static struct tundp_verdict verdict;
	struct tundp_policy policy = { .tun_address = FUZZ_TUNNEL };
	uint8_t *before, *datagram;
	uint8_t choices;

	if (size < 1)
		return 0;
	choices = data[0];
	policy.source_check = (choices >> 1 & 3) % 3;
	before = fuzz_copy(data + 1, --size);
	if (choices & 1)
		fuzz_mend(before, size);
	datagram = fuzz_copy(before, size);

	memset(&verdict, 0xa5, sizeof(verdict));
	tundp_decapsulate(fib, &policy, datagram, size, sources[choices >> 3 & 3], &verdict);
	fuzz_require_verdict(&verdict, before, datagram, size);
	REQUIRE(verdict.kind != TUNDP_FORWARD);
	if (verdict.kind == TUNDP_DELIVER) {
		REQUIRE(verdict.source_matches <= 1);
		REQUIRE(verdict.source_matches || policy.source_check == TUNDP_SOURCE_COUNT);
		REQUIRE(verdict.destination_matches <= 1);
		REQUIRE(verdict.destination_matches || policy.source_check == TUNDP_SOURCE_COUNT);
		if (policy.source_check != TUNDP_SOURCE_OFF)
			REQUIRE(verdict.destination_matches == is_own(fuzz_be32(before + 16)));
		REQUIRE(!is_own(fuzz_be32(before + 12)));
	}
	free(datagram);
	free(before);
	return 0;
}
