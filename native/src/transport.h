/* TCP and UDP headers as segmentation and coalescing need them. Python twin:
 * tundp/wire/transport.py. */
#ifndef TUNDP_TRANSPORT_H
#define TUNDP_TRANSPORT_H

#include "ip.h"

enum {
	PROTO_TCP = 6,
	PROTO_UDP = 17,
	TCP_MIN_HEADER_LEN = 20,
	TCP_OFF_SEQ = 4,
	TCP_OFF_ACK = 8,
	TCP_OFF_DATA = 12,
	TCP_OFF_FLAGS = 13,
	TCP_OFF_WINDOW = 14,
	TCP_OFF_CHECKSUM = 16,
	TCP_OFF_URGENT = 18,
	TCP_FIN = 0x01,
	TCP_PSH = 0x08,
	TCP_ACK = 0x10,
	TCP_ECE = 0x40,
	TCP_CWR = 0x80,
	UDP_HEADER_LEN = 8,
	UDP_OFF_LEN = 4,
	UDP_OFF_CHECKSUM = 6,
};

/* The pseudo-header of a packet that begins with its IPv4 header, as a partial sum. */
static inline uint64_t pseudo_sum(const uint8_t *packet, size_t transport_len)
{
	const uint8_t rest[4] = { 0, packet[IP_OFF_PROTO], (uint8_t)(transport_len >> 8),
				  (uint8_t)transport_len };

	return sums_load32(packet + IP_OFF_SOURCE) + sums_load32(packet + IP_OFF_DESTINATION) +
	       sums_load32(rest);
}

/* Stores the checksum that `sum` (the field counted as zero) asks for. */
static inline void store_transport_checksum(uint8_t *field, uint64_t sum, bool is_udp)
{
	uint16_t value = (uint16_t)~sums_fold(sum);

	sums_store(field, value == 0 && is_udp ? 0xffff : value);
}

#endif
