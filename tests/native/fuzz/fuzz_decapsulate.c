/* Any bytes as a datagram from the underlay: the verdict, and with it the packet, must be
 * sound.
 *
 * Input: a byte of choices (0x01 mend the packet, 0x06 the source check, 0x18 who sent it, 0x20
 * from another port, 0x40 a network is admitted, 0x80 it is for our own port),
 * then the datagram. */
#include "fuzz.h"

/* By fuzz.h's words, not by its table. */
static bool is_own(uint32_t address)
{
	return address == FUZZ_TUNNEL || address == FUZZ_OWN;
}

static bool is_no_host(uint32_t address)
{
	const uint32_t top = address >> 24;

	return top == 0 || top == 127 || (top >= 224 && top < 240) || address == 0xffffffff ||
	       address == FUZZ_BROADCAST;
}

/* A datagram, whole or a first fragment, for the overlay's port of a node. */
static bool is_nested(const uint8_t *packet)
{
	const size_t ports = fuzz_ip_header_len(packet);
	const uint32_t destination = fuzz_be32(packet + 16);

	return packet[9] == 17 && !(fuzz_be16(packet + 6) & 0x1fff) &&
	       fuzz_be16(packet + 2) >= ports + 4 && fuzz_be16(packet + ports + 2) == FUZZ_PORT &&
	       (destination == FUZZ_TUNNEL || destination == FUZZ_PEER);
}

/* Bytes of an answer to what measures paths that are handed over, 0 if it is none. */
static size_t answer_len(const uint8_t *packet)
{
	const size_t start = fuzz_ip_header_len(packet);

	if (packet[9] != 1 || fuzz_be32(packet + 16) != FUZZ_TUNNEL ||
	    fuzz_be16(packet + 6) & 0x1fff || fuzz_be16(packet + 2) < start + 24 ||
	    packet[start] || packet[start + 1] || fuzz_be16(packet + start + 4) != FUZZ_ECHO_ID)
		return 0;
	return start + 24;
}

/* Bytes of the talk between nodes: RFC 792 and 3692 by numbers, who may send by `may_send`. */
static size_t talk_len(const uint8_t *packet, bool may_send)
{
	const size_t start = fuzz_ip_header_len(packet), total = fuzz_be16(packet + 2);
	const uint8_t *quoted = packet + start + 8;
	size_t len;

	if (fuzz_be32(packet + 16) != FUZZ_TUNNEL || fuzz_be16(packet + 6) & 0x3fff || !may_send)
		return 0;
	if (packet[9] == 253)
		return total <= 1500 ? total : 0;
	if (packet[9] != 1 || total < start + 36 || packet[start] != 3 || packet[start + 1] != 2)
		return 0;
	len = start + 8 + fuzz_ip_header_len(quoted) + 8;
	if (quoted[0] >> 4 != 4 || fuzz_ip_header_len(quoted) < 20 || total < len ||
	    quoted[9] != 253 || fuzz_be32(quoted + 12) != FUZZ_TUNNEL)
		return 0;
	return len;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const uint32_t sources[4] = { FUZZ_LOOPBACK, FUZZ_PEER, 0xc6336401, 0 };
	const struct tundp_fib *fib = fuzz_fib(100);
	static struct tundp_verdict verdict;
	struct tundp_policy policy = { .tun_address = FUZZ_TUNNEL,
				       .port = FUZZ_PORT,
				       .echo_id = FUZZ_ECHO_ID,
				       .admitted = { { 0xcb007100, 0xffffff00 } } };
	uint8_t *before, *datagram;
	uint8_t choices;

	if (size < 1)
		return 0;
	choices = data[0];
	policy.source_check = (choices >> 1 & 3) % 3;
	policy.admitted_count = choices >> 6 & 1;
	before = fuzz_copy(data + 1, --size);
	if (choices & 0x80 && size >= 28) {
		const size_t ports = fuzz_ip_header_len(before);

		before[9] = 17;
		if (ports >= 20 && ports + 4 <= size)
			fuzz_store16(before + ports + 2, FUZZ_PORT);
	}
	if (choices & 1)
		fuzz_mend(before, size);
	datagram = fuzz_copy(before, size);

	memset(&verdict, 0xa5, sizeof(verdict));
	tundp_decapsulate(fib, &policy, datagram, size, sources[choices >> 3 & 3],
			  FUZZ_PORT + (choices >> 5 & 1), &verdict);
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
		REQUIRE(!is_no_host(fuzz_be32(before + 12)));
		REQUIRE(!is_no_host(fuzz_be32(before + 16)));
		REQUIRE(!is_nested(before));
		REQUIRE(verdict.echo_len == answer_len(before));
		/* Where the source is checked, the verdict says who may send; else at most so much. */
		if (policy.source_check != TUNDP_SOURCE_OFF)
			REQUIRE(verdict.peer_len == talk_len(before, verdict.source_matches));
		else
			REQUIRE(!verdict.peer_len ||
				(verdict.peer_len == talk_len(before, true) && !(choices & 0x20)));
		REQUIRE(!verdict.source_matches || policy.source_check == TUNDP_SOURCE_OFF ||
			!(choices & 0x20));
	}
	free(datagram);
	free(before);
	return 0;
}
