/* Segmentation: from one read of the TUN to its packets. Python twin: tundp/wire/segment.py. */
#ifndef TUNDP_SEGMENT_H
#define TUNDP_SEGMENT_H

#include "transport.h"
#include "tundp_twins.h"

/* A read being taken apart; borrows the read's bytes until the last `segment_next`. */
struct segmenter {
	const struct tundp_sums *sums;
	const uint8_t *payload; /* what is left of it */
	size_t payload_len;
	uint32_t count;    /* packets in all */
	uint32_t number;   /* the one made next */
	uint32_t seq;      /* of that one, TCP only */
	uint32_t gso_size; /* 0: one plain packet, copied whole */
	uint16_t id;
	uint16_t header_len; /* both headers */
	uint16_t ip_header_len;
	uint16_t seed; /* plain: checksum so far, native order */
	uint16_t csum_start;
	uint32_t csum_field; /* offset in the packet */
	bool has_checksum;   /* plain: there is one to finish */
	uint8_t flags;       /* TCP, of the super-packet */
	bool is_tcp;
	uint64_t ip_sum;        /* fixed words of the IPv4 header */
	uint64_t transport_sum; /* fixed words of transport and pseudo-header */
	uint8_t header[TUNDP_HEADERS_MAX];
};

/* Begins on `len` bytes at `packet`. True with `count` of at least 1, or false with the
 * reason the whole read is dropped for. */
bool segment_begin(struct segmenter *segmenter, const struct tundp_sums *sums,
		   const struct tundp_vnet *vnet, const uint8_t *packet, size_t len,
		   uint32_t *reason);

/* Writes the next packet to `out`, which has room for all that is left plus TUNDP_HEADERS_MAX,
 * and returns its length. Call it `count` times. */
size_t segment_next(struct segmenter *segmenter, uint8_t *out);

/* The packets still to come have a TTL of one less. */
void segment_lower_ttl(struct segmenter *segmenter);

#endif
