/* Whatever packet encapsulation would fragment, at every MTU: the fragments fit, say where
 * they belong, and carry the packet's payload, each byte once.
 *
 * Input: a byte of choices (0x01 mend the packet), the MTU (16 bits), then the packet. */
#include "fuzz.h"

static void require_fragments(const uint8_t *packet, size_t packet_len, size_t mtu)
{
	const size_t header_len = fuzz_ip_header_len(packet);
	const uint16_t field = fuzz_be16(packet + 6);
	const uint8_t *payload = packet + header_len;
	const size_t payload_len = packet_len - header_len;
	uint8_t *out = malloc(mtu);
	size_t taken = 0, piece, len;

	REQUIRE(out);
	while ((piece = tundp_fragment(packet, mtu, taken, out, &len))) {
		const size_t out_header_len = fuzz_ip_header_len(out);
		uint16_t out_field;

		REQUIRE(len <= mtu);
		fuzz_require_ip(out, len);
		out_field = fuzz_be16(out + 6);
		REQUIRE(len == out_header_len + piece && out_header_len <= header_len);
		REQUIRE(taken + piece <= payload_len);
		REQUIRE(!memcmp(out + out_header_len, payload + taken, piece));
		REQUIRE((out_field & 0x1fff) == (field & 0x1fff) + taken / 8);
		REQUIRE(out[8] == packet[8] && out[9] == packet[9]);
		REQUIRE(!memcmp(out + 4, packet + 4, 2) && !memcmp(out + 12, packet + 12, 8));
		taken += piece;
		if (taken < payload_len)
			REQUIRE(out_field & 0x2000 && piece % 8 == 0);
		else
			REQUIRE((out_field & 0x2000) == (field & 0x2000));
	}
	REQUIRE(taken == payload_len);
	free(out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const struct tundp_policy policy = { .tun_address = FUZZ_TUNNEL };
	static struct tundp_verdict verdict;
	const struct tundp_fib *fib;
	uint8_t *packet;
	uint16_t mtu;

	if (size < 3)
		return 0;
	mtu = fuzz_be16(data + 1);
	mtu = mtu < 68 ? 68 : mtu; /* RFC 791 3.2: what nobody may be below */
	size -= 3;
	packet = fuzz_copy(data + 3, size);
	if (size >= 20)
		memcpy(packet + 16, (uint8_t[]){ 10, 5, 0, 3 }, 4);
	if (data[0] & 1)
		fuzz_mend(packet, size);
	fib = fuzz_fib(mtu);
	tundp_encapsulate(fib, &policy, packet, size, &verdict);
	if (verdict.kind == TUNDP_FORWARD && verdict.fragment_mtu) {
		uint8_t *whole = fuzz_copy(packet, verdict.len);

		REQUIRE(verdict.fragment_mtu == mtu && verdict.len > mtu);
		require_fragments(whole, verdict.len, mtu);
		free(whole);
	}
	free(packet);
	return 0;
}
