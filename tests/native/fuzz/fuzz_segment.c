/* Any vnet header before any bytes: what tundp_segment makes of them adds up, and is what a
 * sender without offloads would have sent.
 *
 * Input: a byte of choices (0x01 mend the packet, 0x02 lower the TTL), the vnet header in
 * the machine's byte order as a TUN gives it, then the packet. */
#include "fuzz.h"

enum { MAX_PACKETS = 5000 };

struct made {
	const uint8_t *packets;
	const uint32_t *lens;
	size_t count;
};

/* A plain packet comes back as it was, but for the checksum it may have asked for. */
static void require_plain(const struct tundp_vnet *vnet, const uint8_t *packet, size_t len,
			  const struct made *made)
{
	const size_t field = (size_t)vnet->csum_start + vnet->csum_offset;
	uint8_t *expected = fuzz_copy(packet, len);

	REQUIRE(made->count == 1 && made->lens[0] == len);
	if (vnet->flags & TUNDP_VNET_NEEDS_CSUM) {
		uint32_t sum;
		uint16_t value;

		REQUIRE(field + 2 <= len);
		sum = fuzz_be16(expected + field);
		fuzz_store16(expected + field, 0);
		sum += fuzz_sum(0, expected + vnet->csum_start, len - vnet->csum_start);
		value = (uint16_t)~((sum & 0xffff) + (sum >> 16));
		/* RFC 768: a UDP checksum of zero means there is none. */
		if (value == 0 && vnet->csum_offset == 6)
			value = 0xffff;
		fuzz_store16(expected + field, value);
	}
	REQUIRE(len == 0 || !memcmp(made->packets, expected, len));
	free(expected);
}

static void require_super(const struct tundp_vnet *vnet, const uint8_t *packet, bool lowers_ttl,
			  const struct made *made)
{
	const size_t ip_len = fuzz_ip_header_len(packet);
	const size_t total_len = fuzz_be16(packet + 2);
	const bool is_tcp = packet[9] == 6;
	const size_t header_len =
		ip_len + (is_tcp ? (size_t)(packet[ip_len + 12] >> 4) * 4 : 8);
	const uint8_t *at = made->packets;
	size_t taken = 0;

	for (size_t i = 0; i < made->count; i++, at += made->lens[i - 1]) {
		const size_t len = made->lens[i];
		const size_t piece = len - header_len;
		const bool is_last = i + 1 == made->count;
		uint8_t *expected = malloc(len);

		REQUIRE(expected && len >= header_len && header_len + taken + piece <= total_len);
		REQUIRE(is_last || piece == vnet->gso_size);
		memcpy(expected, packet, header_len);
		memcpy(expected + header_len, packet + header_len + taken, piece);
		fuzz_store16(expected + 2, (uint16_t)len);
		fuzz_store16(expected + 4, (uint16_t)(fuzz_be16(packet + 4) + i));
		expected[8] = (uint8_t)(packet[8] - lowers_ttl);
		if (is_tcp) {
			const uint32_t seq = fuzz_be32(packet + ip_len + 4) + (uint32_t)taken;

			fuzz_store16(expected + ip_len + 4, (uint16_t)(seq >> 16));
			fuzz_store16(expected + ip_len + 6, (uint16_t)seq);
			if (!is_last)
				expected[ip_len + 13] &= 0xf6; /* FIN, PSH: at the end */
			if (i)
				expected[ip_len + 13] &= 0x7f; /* CWR: once (RFC 3168) */
		}
		fuzz_mend(expected, len);
		/* Either zero will do in TCP; which one is not the matter here. */
		if (is_tcp && fuzz_be16(at + ip_len + 16) == 0 &&
		    fuzz_be16(expected + ip_len + 16) == 0xffff)
			fuzz_store16(expected + ip_len + 16, 0);
		REQUIRE(!memcmp(at, expected, len));
		fuzz_require_ip(at, len);
		REQUIRE(fuzz_transport_sum(at, len) == 0xffff);
		taken += piece;
		free(expected);
	}
	REQUIRE(header_len + taken == total_len);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct tundp_vnet vnet;
	struct made made;
	uint8_t *packet, *before, *out;
	uint32_t *lens;
	size_t count, out_len, used = 0;
	int64_t result;
	bool lowers_ttl;

	if (size < 1 + sizeof(vnet))
		return 0;
	memcpy(&vnet, data + 1, sizeof(vnet));
	lowers_ttl = data[0] & 2;
	packet = fuzz_copy(data + 11, size -= 11);
	if (data[0] & 1)
		fuzz_mend(packet, size);
	before = fuzz_copy(packet, size);
	count = (vnet.gso_type & 0x7f) && vnet.gso_size ? size / vnet.gso_size + 1 : 1;
	if (count > MAX_PACKETS)
		count = MAX_PACKETS;
	lens = malloc(count * sizeof(*lens));
	out_len = size + count * 120;
	out = malloc(out_len);
	REQUIRE(lens && out);

	result = tundp_segment(&vnet, packet, size, lowers_ttl, out, out_len, lens, count);
	REQUIRE(size == 0 || !memcmp(before, packet, size));
	if (result == INT64_MIN) {
		REQUIRE(count == MAX_PACKETS);
	} else if (result < 0) {
		REQUIRE(-1 - result < TUNDP_DROP_COUNT);
	} else {
		REQUIRE(result >= 1 && (size_t)result <= count);
		for (int64_t i = 0; i < result; i++)
			used += lens[i];
		REQUIRE(used <= out_len);
		made = (struct made){ .packets = out, .lens = lens, .count = (size_t)result };
		if (vnet.gso_type & 0x7f)
			require_super(&vnet, packet, lowers_ttl, &made);
		else
			require_plain(&vnet, packet, size, &made);
	}
	free(out);
	free(lens);
	free(before);
	free(packet);
	return 0;
}
