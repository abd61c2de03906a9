/* The Internet checksum. Python twin: tundp/wire/checksum.py, which is the specification. */
#include <arpa/inet.h>
#include <string.h>

#include "tundp.h"

static uint16_t fold(uint64_t sum)
{
	sum = (sum & 0xffffffffu) + (sum >> 32);
	sum = (sum & 0xffffffffu) + (sum >> 32);
	sum = (sum & 0xffffu) + (sum >> 16);
	sum = (sum & 0xffffu) + (sum >> 16);
	return (uint16_t)sum;
}

/* The sum is neutral to byte order (RFC 1071 section 2 B): words are added as the machine
 * loads them, and only the folded result is put into network order. Loads go through
 * memcpy, since packets are aligned to nothing. */
uint16_t tundp_sum(const uint8_t *data, size_t len)
{
	uint64_t sum = 0;

	for (; len >= 4; data += 4, len -= 4) {
		uint32_t word;

		memcpy(&word, data, sizeof(word));
		sum += word;
	}
	if (len >= 2) {
		uint16_t half;

		memcpy(&half, data, sizeof(half));
		sum += half;
		data += 2;
		len -= 2;
	}
	if (len) {
		/* The odd byte is the first of a pair whose second is zero. */
		const uint8_t pair[2] = { *data, 0 };
		uint16_t half;

		memcpy(&half, pair, sizeof(half));
		sum += half;
	}
	return ntohs(fold(sum));
}

uint16_t tundp_checksum_after_ttl_decrement(uint16_t header_checksum)
{
	uint32_t raised = (uint32_t)header_checksum + 0x0100u;

	raised = (raised & 0xffffu) + (raised >> 16);
	return raised == 0xffffu ? 0 : (uint16_t)raised;
}
