/* What the fuzz targets share: a small FIB, a slow checksum of their own, and blocks of
 * memory that end where the bytes do, so that AddressSanitizer sees one read too many.
 *
 * Fuzzers do not find checksums. So most inputs say in a bit whether their packets are taken
 * as they are, or mended first: lengths and checksums that fit, all else as it is. */
#ifndef TUNDP_FUZZ_H
#define TUNDP_FUZZ_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tundp_twins.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define REQUIRE(condition)                                                               \
	do {                                                                             \
		if (!(condition)) {                                                      \
			fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__,       \
				#condition);                                             \
			abort();                                                         \
		}                                                                        \
	} while (0)

enum {
	FUZZ_LOOPBACK = 0x7f000001,
	FUZZ_PEER = 0xc0000207,
	FUZZ_TUNNEL = 0x0a050001,
	FUZZ_OWN = 0x0a050004,
	FUZZ_BROADCAST = 0xc00002ff,
	FUZZ_PORT = 9,
	FUZZ_ECHO_ID = 1,
	FUZZ_HOPS = 10,
	FUZZ_HOP_WIDE = 7,   /* 10.5.0.0/31 and 10.5.0.6/31: at 127.0.0.1 */
	FUZZ_HOP_NARROW = 8, /* 10.5.0.2/31: packets above fuzz_narrow_mtu do not fit */
	FUZZ_HOP_OWN = 9,    /* 10.5.0.4 */
};

static struct tundp_hop fuzz_hops[FUZZ_HOPS] = {
	[FUZZ_HOP_WIDE] = { .address = FUZZ_LOOPBACK, .port = 9 },
	[FUZZ_HOP_NARROW] = { .address = FUZZ_PEER, .port = 9 },
	[FUZZ_HOP_OWN] = { .flags = TUNDP_HOP_LOCAL },
};
static const uint32_t fuzz_peers[] = { FUZZ_LOOPBACK, FUZZ_PEER };
static const uint32_t fuzz_peer_hops[] = { FUZZ_HOP_WIDE, FUZZ_HOP_NARROW };
static const uint32_t fuzz_own[] = { FUZZ_TUNNEL };
static const uint32_t fuzz_broadcasts[] = { FUZZ_BROADCAST };
/* 10.5.0.0/29: two bits, then one. */
static const uint32_t fuzz_table[] = {
	FUZZ_HOP_WIDE, FUZZ_HOP_NARROW, 0x80000000u | 4, FUZZ_HOP_WIDE, FUZZ_HOP_OWN, 0,
};
static struct tundp_path fuzz_paths[FUZZ_HOPS];

/* The FIB as new: nothing learnt. */
static inline const struct tundp_fib *fuzz_fib(uint16_t narrow_mtu)
{
	static struct tundp_fib fib = {
		.base = 0x0a050000,
		.base_len = 29,
		.level_count = 2,
		.stride = { 2, 1 },
		.table = fuzz_table,
		.table_count = sizeof(fuzz_table) / sizeof(fuzz_table[0]),
		.hops = fuzz_hops,
		.ways = fuzz_hops,
		.hop_count = FUZZ_HOPS,
		.paths = fuzz_paths,
		.peers = fuzz_peers,
		.peer_hops = fuzz_peer_hops,
		.peer_count = 2,
		.own = fuzz_own,
		.own_count = 1,
		.broadcasts = fuzz_broadcasts,
		.broadcast_count = 1,
		.generation = 1,
	};

	memset(fuzz_paths, 0, sizeof(fuzz_paths));
	fuzz_paths[FUZZ_HOP_NARROW].inner_mtu = narrow_mtu;
	REQUIRE(tundp_fib_check(&fib) == 0);
	return &fib;
}

/* A copy that ends where the bytes do. */
static inline uint8_t *fuzz_copy(const uint8_t *data, size_t size)
{
	uint8_t *copy = calloc(1, size + !size);

	REQUIRE(copy);
	if (size)
		memcpy(copy, data, size);
	return copy;
}

static inline uint16_t fuzz_be16(const uint8_t *at)
{
	return (uint16_t)(at[0] << 8 | at[1]);
}

static inline uint32_t fuzz_be32(const uint8_t *at)
{
	return (uint32_t)fuzz_be16(at) << 16 | fuzz_be16(at + 2);
}

static inline void fuzz_store16(uint8_t *at, uint16_t value)
{
	at[0] = (uint8_t)(value >> 8);
	at[1] = (uint8_t)value;
}

/* RFC 1071, the slow way; `sum` is what came before, of an even length. */
static inline uint16_t fuzz_sum(uint32_t sum, const uint8_t *data, size_t len)
{
	for (size_t i = 0; i < len; i++) {
		sum += i & 1 ? data[i] : (uint32_t)data[i] << 8;
		sum = (sum & 0xffff) + (sum >> 16);
	}
	return (uint16_t)sum;
}

static inline size_t fuzz_ip_header_len(const uint8_t *packet)
{
	return (size_t)(packet[0] & 0x0f) * 4;
}

/* Of an IPv4 packet of exactly `len` bytes: pseudo-header, header and payload (RFC 9293 3.1). */
static inline uint16_t fuzz_transport_sum(const uint8_t *packet, size_t len)
{
	const size_t header_len = fuzz_ip_header_len(packet);
	uint32_t sum = fuzz_sum(0, packet + 12, 8);

	sum += packet[9] + (uint32_t)(len - header_len);
	sum = (sum & 0xffff) + (sum >> 16);
	return fuzz_sum(sum, packet + header_len, len - header_len);
}

/* Offset of the transport checksum, or 0 if the packet has none that could be checked. */
static inline size_t fuzz_transport_field(const uint8_t *packet, size_t len)
{
	const size_t header_len = fuzz_ip_header_len(packet);

	if (fuzz_be16(packet + 6) & 0x3fff)
		return 0;
	if (packet[9] == 6 && len >= header_len + 20)
		return header_len + 16;
	if (packet[9] == 17 && len >= header_len + 8)
		return header_len + 6;
	return 0;
}

/* Makes lengths and checksums fit, where that is all an IPv4 packet lacks. */
static inline void fuzz_mend(uint8_t *packet, size_t len)
{
	size_t header_len, field;

	if (len < 20 || len > 0xffff)
		return;
	header_len = fuzz_ip_header_len(packet);
	if (packet[0] >> 4 != 4 || header_len < 20 || header_len > len)
		return;
	if (fuzz_be16(packet + 2) < header_len || fuzz_be16(packet + 2) > len)
		fuzz_store16(packet + 2, (uint16_t)len);
	len = fuzz_be16(packet + 2);
	field = fuzz_transport_field(packet, len);
	if (field && packet[9] == 17)
		fuzz_store16(packet + header_len + 4, (uint16_t)(len - header_len));
	if (field) {
		uint16_t value;

		fuzz_store16(packet + field, 0);
		value = (uint16_t)~fuzz_transport_sum(packet, len);
		fuzz_store16(packet + field, value ? value : 0xffff);
	}
	fuzz_store16(packet + 10, 0);
	fuzz_store16(packet + 10, (uint16_t)~fuzz_sum(0, packet, header_len));
}

/* What every packet that leaves must be: one whole IPv4 packet with a sound header. */
static inline void fuzz_require_ip(const uint8_t *packet, size_t len)
{
	REQUIRE(len >= 20 && packet[0] >> 4 == 4);
	REQUIRE(fuzz_ip_header_len(packet) >= 20 && fuzz_ip_header_len(packet) <= len);
	REQUIRE(fuzz_be16(packet + 2) == len);
	REQUIRE(fuzz_sum(0, packet, fuzz_ip_header_len(packet)) == 0xffff);
}

/* What a verdict may be, whatever the packet was. */
static inline void fuzz_require_verdict(const struct tundp_verdict *verdict,
					const uint8_t *before, const uint8_t *packet, size_t len)
{
	uint8_t again[20];

	REQUIRE(verdict->kind <= TUNDP_DROP);
	if (verdict->kind == TUNDP_REPLY || verdict->kind == TUNDP_DROP) {
		REQUIRE(verdict->reason < TUNDP_DROP_COUNT);
		REQUIRE(len == 0 || !memcmp(before, packet, len));
		if (verdict->kind == TUNDP_DROP)
			return;
		REQUIRE(verdict->reply_len >= 28 && verdict->reply_len <= TUNDP_REPLY_MAX);
		fuzz_require_ip(verdict->reply, verdict->reply_len);
		REQUIRE(verdict->reply[9] == 1);
		REQUIRE(fuzz_sum(0, verdict->reply + 20, verdict->reply_len - 20) == 0xffff);
		/* To whom the packet is from, quoting it. */
		REQUIRE(!memcmp(verdict->reply + 16, before + 12, 4));
		REQUIRE(verdict->reply_len - 28 <= len);
		REQUIRE(!memcmp(verdict->reply + 28, before, verdict->reply_len - 28));
		return;
	}
	/* Nothing but the TTL, and what that does to the checksum. */
	REQUIRE(verdict->len <= len);
	fuzz_require_ip(packet, verdict->len);
	memcpy(again, packet, sizeof(again));
	again[8]++;
	memcpy(again + 10, before + 10, 2);
	REQUIRE(before[8] > 1 && !memcmp(again, before, sizeof(again)));
	REQUIRE(!memcmp(packet + 20, before + 20, len - 20));
}

/* Bytes cut into records of a 16-bit length and as many bytes. A length that reaches past the
 * end gets all that is left, and, if it is even, is filled up: small inputs make large packets. */
struct fuzz_cursor {
	const uint8_t *at;
	size_t left;
};

static inline uint8_t fuzz_byte(struct fuzz_cursor *cursor)
{
	if (!cursor->left)
		return 0;
	cursor->left--;
	return *cursor->at++;
}

/* The next record, the caller's to free; NULL at the end. */
static inline uint8_t *fuzz_record(struct fuzz_cursor *cursor, size_t *len)
{
	uint8_t *record;
	size_t given;

	if (cursor->left < 2)
		return NULL;
	*len = fuzz_be16(cursor->at);
	cursor->at += 2;
	cursor->left -= 2;
	given = *len < cursor->left ? *len : cursor->left;
	if (*len & 1)
		*len = given;
	record = malloc(*len + !*len);
	REQUIRE(record);
	memcpy(record, cursor->at, given);
	for (size_t i = given; i < *len; i++)
		record[i] = (uint8_t)(i * 7);
	cursor->at += given;
	cursor->left -= given;
	return record;
}

#endif
