/* Any bytes, cut into packets, of which those that decapsulation delivers are merged: nothing
 * is lost or made up, and splitting what was written gives the packets back.
 *
 * Input: a byte of choices (0x01 mend, 0x02 no TCP, 0x04 no UDP), the most packets in a UDP
 * super-packet, then records (fuzz.h). */
#include "fuzz.h"

enum { MAX_PACKETS = 200 };

struct packet {
	uint8_t *bytes;
	uint32_t len;
	bool is_found;
};

struct packets {
	struct packet all[MAX_PACKETS];
	size_t count;
};

static void take(struct packets *packets, struct fuzz_cursor *cursor, bool is_mended)
{
	static const struct tundp_policy policy = { .tun_address = FUZZ_TUNNEL };
	static struct tundp_verdict verdict;
	const struct tundp_fib *fib = fuzz_fib(0);
	uint8_t *datagram;
	size_t len;

	while (packets->count < MAX_PACKETS && (datagram = fuzz_record(cursor, &len))) {
		struct packet *packet = &packets->all[packets->count];

		if (is_mended)
			fuzz_mend(datagram, len);
		tundp_decapsulate(fib, &policy, datagram, len, FUZZ_LOOPBACK, FUZZ_PORT, &verdict);
		if (verdict.kind == TUNDP_DELIVER) {
			*packet = (struct packet){ .bytes = datagram, .len = verdict.len };
			packets->count++;
		} else {
			free(datagram);
		}
	}
}

static bool is_same(const uint8_t *made, const uint8_t *packet, size_t len, bool is_single)
{
	uint8_t *a, *b;
	bool same;
	size_t field;

	if (is_single)
		return !memcmp(made, packet, len);
	a = fuzz_copy(made, len);
	b = fuzz_copy(packet, len);
	/* The ID of what must not be fragmented means nothing (RFC 6864), and goes; where it
	 * means something, what is merged has one after the other. Checksums follow. */
	if (packet[6] & 0x40)
		memcpy(a + 4, b + 4, 2);
	memset(a + 10, 0, 2);
	memset(b + 10, 0, 2);
	field = fuzz_transport_field(a, len);
	REQUIRE(field);
	REQUIRE(fuzz_transport_sum(made, len) == 0xffff);
	memset(a + field, 0, 2);
	memset(b + field, 0, 2);
	same = !memcmp(a, b, len);
	free(a);
	free(b);
	return same;
}

/* Takes the first of the packets that is this one off the list. */
static void claim(struct packets *packets, const uint8_t *made, size_t len, bool is_single)
{
	bool was_there = false;

	for (size_t i = 0; i < packets->count && !was_there; i++) {
		struct packet *packet = &packets->all[i];

		was_there = !packet->is_found && packet->len == len &&
			    is_same(made, packet->bytes, len, is_single);
		packet->is_found |= was_there;
	}
	REQUIRE(was_there);
}

static void split(struct packets *packets, const struct tundp_vnet *vnet, const uint8_t *packet,
		  size_t len, uint32_t count)
{
	const size_t room = len + (size_t)count * 120;
	uint8_t *whole = fuzz_copy(packet, len);
	uint8_t *out = malloc(room), *at = out;
	uint32_t *lens = calloc(count, sizeof(*lens));

	REQUIRE(out && lens);
	fuzz_require_ip(packet, len);
	REQUIRE(vnet->flags == TUNDP_VNET_NEEDS_CSUM && vnet->hdr_len < len);
	REQUIRE(tundp_segment(vnet, whole, len, 0, out, room, lens, count) == count);
	for (uint32_t i = 0; i < count; at += lens[i++]) {
		fuzz_require_ip(at, lens[i]);
		claim(packets, at, lens[i], false);
	}
	free(lens);
	free(out);
	free(whole);
}

static void merge(struct packets *packets, uint8_t choices, uint32_t max_udp_segments)
{
	static uint8_t *scratch;
	uint64_t misses[TUNDP_MISS_COUNT] = { 0 }, missed = 0;
	size_t in_len = 0, out_len = 0, total = 0;
	uint32_t lens[MAX_PACKETS];
	uint8_t *in, *out, *at;
	int64_t used;
	struct tundp_coalesce_input input;

	/* Once, and never freed: too large to be had for each input. */
	if (!scratch)
		scratch = malloc(TUNDP_COALESCE_SCRATCH);
	for (size_t i = 0; i < packets->count; i++)
		in_len += TUNDP_VNET_LEN + packets->all[i].len;
	in = malloc(in_len + !in_len);
	out_len = in_len + 8 * packets->count;
	out = malloc(out_len + !out_len);
	REQUIRE(scratch && in && out);
	at = in;
	for (size_t i = 0; i < packets->count; i++) {
		lens[i] = packets->all[i].len;
		memcpy(at + TUNDP_VNET_LEN, packets->all[i].bytes, lens[i]);
		at += TUNDP_VNET_LEN + lens[i];
	}

	input = (struct tundp_coalesce_input){ .packets = in,
					       .lens = lens,
					       .count = packets->count,
					       .is_tcp_on = !(choices & 2),
					       .is_udp_on = !(choices & 4),
					       .max_udp_segments = max_udp_segments };
	used = tundp_coalesce(&input, scratch, out, out_len, misses);
	REQUIRE(used >= 0 && (size_t)used <= out_len);
	for (at = out; at < out + used;) {
		struct tundp_vnet vnet;
		uint32_t head[2];

		memcpy(head, at, sizeof(head));
		memcpy(&vnet, at + sizeof(head), sizeof(vnet));
		at += sizeof(head) + TUNDP_VNET_LEN;
		REQUIRE(head[0] >= 1 && at + head[1] <= out + used);
		if (head[0] == 1) {
			claim(packets, at, head[1], true);
		} else {
			REQUIRE(!(choices & 2) || at[9] != 6);
			REQUIRE(!(choices & 4) || at[9] != 17);
			REQUIRE(head[0] <= (at[9] == 17 ? max_udp_segments : 64));
			split(packets, &vnet, at, head[1], head[0]);
		}
		total += head[0];
		at += head[1];
	}
	REQUIRE(total == packets->count);
	for (int i = 0; i < TUNDP_MISS_COUNT; i++)
		missed += misses[i];
	/* Why the item before was closed, and what is wrong with the packet itself. */
	REQUIRE(missed <= 2 * packets->count);
	free(out);
	free(in);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct fuzz_cursor cursor = { .at = data, .left = size };
	static struct packets packets;
	const uint8_t choices = fuzz_byte(&cursor);
	const uint32_t max_udp_segments = 1 + fuzz_byte(&cursor) % 128u;

	packets.count = 0;
	take(&packets, &cursor, choices & 1);
	merge(&packets, choices, max_udp_segments);
	for (size_t i = 0; i < packets.count; i++)
		free(packets.all[i].bytes);
	return 0;
}
