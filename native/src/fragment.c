/* IPv4 fragmentation. Python twin: tundp/wire/fragment.py, which has the reasons. */
#include "ip.h"
#include "tundp_twins.h"

enum {
	OPTION_END = 0,
	OPTION_NOP = 1,
	OPTION_COPIED = 0x80,
	OPTIONS_MAX = 40,
};

/* The options every fragment repeats, padded to 4 bytes with zeros; returns their length. */
static size_t copied_options(const uint8_t *options, size_t len, uint8_t *kept)
{
	size_t kept_len = 0;
	size_t at = 0;

	memset(kept, 0, OPTIONS_MAX);
	while (at < len && options[at] != OPTION_END) {
		size_t option_len;

		if (options[at] == OPTION_NOP) {
			at++;
			continue;
		}
		option_len = at + 1 < len ? options[at + 1] : 0;
		if (option_len < 2 || option_len > len - at)
			break;
		if (options[at] & OPTION_COPIED) {
			memcpy(kept + kept_len, options + at, option_len);
			kept_len += option_len;
		}
		at += option_len;
	}
	return (kept_len + 3) / 4 * 4;
}

size_t tundp_fragment(const uint8_t *packet, size_t mtu, size_t taken, uint8_t *out,
		      size_t *out_len)
{
	size_t header_len = (size_t)(packet[0] & 0x0f) * 4;
	size_t payload_len = load_be16(packet + IP_OFF_TOTAL_LEN) - header_len;
	uint16_t flags_offset = load_be16(packet + IP_OFF_FLAGS);
	size_t options_len = header_len - IP_MIN_HEADER_LEN;
	uint8_t kept[OPTIONS_MAX];
	size_t new_header_len, room, piece_len;
	uint16_t more;

	if (taken >= payload_len)
		return 0;
	if (taken == 0)
		memcpy(kept, packet + IP_MIN_HEADER_LEN, options_len);
	else
		options_len = copied_options(packet + IP_MIN_HEADER_LEN, options_len, kept);
	new_header_len = IP_MIN_HEADER_LEN + options_len;
	room = (mtu - new_header_len) / 8 * 8;
	piece_len = payload_len - taken < room ? payload_len - taken : room;
	more = taken + piece_len < payload_len ? IP_FLAG_MF : (flags_offset & IP_FLAG_MF);

	memcpy(out, packet, IP_MIN_HEADER_LEN);
	memcpy(out + IP_MIN_HEADER_LEN, kept, options_len);
	memcpy(out + new_header_len, packet + header_len + taken, piece_len);
	out[0] = (uint8_t)(0x40 | new_header_len / 4);
	store_be16(out + IP_OFF_TOTAL_LEN, (uint16_t)(new_header_len + piece_len));
	store_be16(out + IP_OFF_FLAGS,
		   (uint16_t)(more | ((flags_offset & IP_OFFSET_MASK) + taken / 8)));
	ip_store_checksum(out, new_header_len);
	*out_len = new_header_len + piece_len;
	return piece_len;
}
