/* Any bytes as a packet from the TUN: the verdict, and with it the packet, must be sound.
 *
 * Input: a byte of choices (0x01 mend the packet, 0x02 to the narrow hop), then the packet. */
#include "fuzz.h"

static void fragment(const uint8_t *packet, const struct tundp_verdict *verdict)
{
	const size_t mtu = verdict->fragment_mtu;
	uint8_t *out = malloc(mtu);
	size_t taken = 0, piece, len;

	REQUIRE(out);
	while ((piece = tundp_fragment(packet, mtu, taken, out, &len))) {
		REQUIRE(len <= mtu);
		fuzz_require_ip(out, len);
		taken += piece;
	}
	REQUIRE(taken == verdict->len - fuzz_ip_header_len(packet));
	free(out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const struct tundp_policy policy = { .tun_address = FUZZ_TUNNEL };
	const struct tundp_fib *fib = fuzz_fib(100);
	static struct tundp_verdict verdict;
	uint8_t *before, *packet;
	uint8_t choices;

	if (size < 1)
		return 0;
	choices = data[0];
	before = fuzz_copy(data + 1, --size);
	if (choices & 2 && size >= 20)
		memcpy(before + 16, (uint8_t[]){ 10, 5, 0, 2 }, 4);
	if (choices & 1)
		fuzz_mend(before, size);
	packet = fuzz_copy(before, size);

	memset(&verdict, 0xa5, sizeof(verdict));
	tundp_encapsulate(fib, &policy, packet, size, &verdict);
	fuzz_require_verdict(&verdict, before, packet, size);
	REQUIRE(verdict.kind != TUNDP_DELIVER);
	if (verdict.kind == TUNDP_FORWARD) {
		REQUIRE(verdict.hop == FUZZ_HOP_WIDE || verdict.hop == FUZZ_HOP_NARROW);
		REQUIRE((verdict.fragment_mtu == 100) ==
			(verdict.hop == FUZZ_HOP_NARROW && verdict.len > 100));
		if (verdict.fragment_mtu)
			fragment(packet, &verdict);
	}
	free(packet);
	free(before);
	return 0;
}
