/* IPv4 header: checked reading and writing of bytes that are aligned to nothing. Header-only: it
 * needs no other object file. Python twin: tundp/wire/ip.py. */
#ifndef TUNDP_IP_H
#define TUNDP_IP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "sums.h"
#include "tundp_tables.h"

enum {
	IP_MIN_HEADER_LEN = 20,
	IP_PROTO_ICMP = 1,
	IP_OFF_TOTAL_LEN = 2,
	IP_OFF_FLAGS = 6,
	IP_OFF_TTL = 8,
	IP_OFF_PROTO = 9,
	IP_OFF_CHECKSUM = 10,
	IP_OFF_SOURCE = 12,
	IP_OFF_DESTINATION = 16,
	IP_FLAG_DF = 0x4000,
	IP_FLAG_MF = 0x2000,
	IP_OFFSET_MASK = 0x1fff,
	IP_MAX_LEN = 0xffff,
};

struct ip_header {
	uint32_t source;
	uint32_t destination;
	uint16_t total_len;
	uint16_t flags_offset;
	uint16_t checksum;
	uint8_t header_len;
	uint8_t ttl;
	uint8_t ip_proto;
};

static inline uint16_t load_be16(const uint8_t *at)
{
	return (uint16_t)((uint16_t)at[0] << 8 | at[1]);
}

static inline uint32_t load_be32(const uint8_t *at)
{
	return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

static inline void store_be16(uint8_t *at, uint16_t value)
{
	at[0] = (uint8_t)(value >> 8);
	at[1] = (uint8_t)value;
}

static inline void store_be32(uint8_t *at, uint32_t value)
{
	store_be16(at, (uint16_t)(value >> 16));
	store_be16(at + 2, (uint16_t)value);
}

/* Reads the header of a packet that ip_parse has accepted before. */
static inline void ip_read(const uint8_t *packet, struct ip_header *header)
{
	header->header_len = (uint8_t)((packet[0] & 0x0f) * 4);
	header->total_len = load_be16(packet + IP_OFF_TOTAL_LEN);
	header->flags_offset = load_be16(packet + IP_OFF_FLAGS);
	header->ttl = packet[IP_OFF_TTL];
	header->ip_proto = packet[IP_OFF_PROTO];
	header->checksum = load_be16(packet + IP_OFF_CHECKSUM);
	header->source = load_be32(packet + IP_OFF_SOURCE);
	header->destination = load_be32(packet + IP_OFF_DESTINATION);
}

/* Reads the header at `packet`, `len` bytes long, or gives the first reason not to carry
 * it in `reason`. */
static inline bool ip_parse(const uint8_t *packet, size_t len, struct ip_header *header,
			    uint32_t *reason)
{
	if (len < IP_MIN_HEADER_LEN) {
		*reason = TUNDP_DROP_TOO_SHORT;
		return false;
	}
	if (packet[0] >> 4 != 4) {
		*reason = TUNDP_DROP_NOT_IPV4;
		return false;
	}
	ip_read(packet, header);
	if (header->header_len < IP_MIN_HEADER_LEN || header->header_len > len) {
		*reason = TUNDP_DROP_BAD_HEADER_LENGTH;
		return false;
	}
	if (header->total_len < header->header_len || header->total_len > len ||
	    (header->flags_offset & IP_OFFSET_MASK) * 8 + header->total_len > IP_MAX_LEN) {
		*reason = TUNDP_DROP_BAD_TOTAL_LENGTH;
		return false;
	}
	if (sums_fold(sums_words(packet, header->header_len)) != 0xffff) {
		*reason = TUNDP_DROP_BAD_HEADER_CHECKSUM;
		return false;
	}
	return true;
}

/* 240/4 is unicast, as in the kernel (ipv4_is_multicast, ipv4_is_lbcast in linux/in.h). */
static inline bool ip_is_unicast(uint32_t address)
{
	return address >> 28 != 0xeu && address != 0xffffffffu;
}

static inline bool ip_is_single_host(uint32_t address)
{
	uint32_t top = address >> 24;

	return ip_is_unicast(address) && top != 0 && top != 127;
}

/* The header checksum after the TTL, the high byte of its word, is one less (RFC 1624: 0xffff is
 * stored as 0). */
static inline uint16_t ip_checksum_after_ttl_decrement(uint16_t checksum)
{
	uint32_t raised = (uint32_t)checksum + 0x0100u;

	raised = (raised & 0xffffu) + (raised >> 16);
	return raised == 0xffffu ? 0 : (uint16_t)raised;
}

/* The reverse, but that a checksum of 0xffff comes back as 0, which means the same. */
static inline uint16_t ip_checksum_before_ttl_decrement(uint16_t checksum)
{
	uint32_t lowered = (uint32_t)checksum + 0xfeffu;

	lowered = (lowered & 0xffffu) + (lowered >> 16);
	return lowered == 0xffffu ? 0 : (uint16_t)lowered;
}

/* Lowers the TTL, which must be above 0, and patches the checksum. */
static inline void ip_decrement_ttl(uint8_t *packet, const struct ip_header *header)
{
	packet[IP_OFF_TTL] = (uint8_t)(header->ttl - 1);
	store_be16(packet + IP_OFF_CHECKSUM, ip_checksum_after_ttl_decrement(header->checksum));
}

/* Puts the TTL back that ip_decrement_ttl lowered. */
static inline void ip_restore_ttl(uint8_t *packet, const struct ip_header *header)
{
	packet[IP_OFF_TTL] = (uint8_t)(header->ttl + 1);
	store_be16(packet + IP_OFF_CHECKSUM, ip_checksum_before_ttl_decrement(header->checksum));
}

/* Stores the header checksum of `header_len` bytes at `packet`. */
static inline void ip_store_checksum(uint8_t *packet, size_t header_len)
{
	sums_store(packet + IP_OFF_CHECKSUM, 0);
	sums_store(packet + IP_OFF_CHECKSUM, (uint16_t)~sums_fold(sums_words(packet, header_len)));
}

#endif
