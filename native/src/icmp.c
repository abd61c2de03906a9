/* ICMP errors about inner packets. Python twin: tundp/wire/icmp.py, which has the reasons. */
#include "icmp.h"

enum {
	TYPE_DEST_UNREACHABLE = 3,
	TYPE_TIME_EXCEEDED = 11,
	CODE_NET_UNREACHABLE = 0,
	CODE_FRAGMENTATION_NEEDED = 4,
	CODE_TTL_EXCEEDED = 0,
	FLANNEL_TTL = 8,
	FLANNEL_QUOTE_LEN = 8,
	DEFAULT_TTL = 64,
	INTERNETWORK_CONTROL = 0xc0,
	ICMP_HEADER_LEN = 8,
	LONG_QUOTE_LEN = TUNDP_REPLY_MAX - IP_MIN_HEADER_LEN - ICMP_HEADER_LEN,
};

struct error {
	uint32_t rest;
	uint16_t quote_len;
	uint8_t type;
	uint8_t code;
	uint8_t ttl;
	uint8_t tos;
};

static bool is_query(uint8_t icmp_type)
{
	switch (icmp_type) {
	case 0:
	case 8:
	case 9:
	case 10:
	case 13:
	case 14:
	case 15:
	case 16:
	case 17:
	case 18:
		return true;
	default:
		return false;
	}
}

static bool may_answer(const uint8_t *offender, const struct ip_header *header)
{
	if (header->flags_offset & IP_OFFSET_MASK)
		return false;
	if (!ip_is_single_host(header->source) || !ip_is_unicast(header->destination))
		return false;
	if (header->ip_proto == IP_PROTO_ICMP)
		return header->total_len > header->header_len &&
		       is_query(offender[header->header_len]);
	return true;
}

static uint32_t build(const uint8_t *offender, const struct ip_header *header, uint32_t tun_address,
		      const struct error *error, uint8_t *reply)
{
	uint8_t *icmp = reply + IP_MIN_HEADER_LEN;
	uint16_t quote_len = error->quote_len;
	uint16_t body_len;

	if (quote_len > header->total_len)
		quote_len = header->total_len;
	body_len = (uint16_t)(ICMP_HEADER_LEN + quote_len);

	memset(reply, 0, IP_MIN_HEADER_LEN + ICMP_HEADER_LEN);
	reply[0] = 0x45;
	reply[1] = error->tos;
	store_be16(reply + IP_OFF_TOTAL_LEN, (uint16_t)(IP_MIN_HEADER_LEN + body_len));
	reply[IP_OFF_TTL] = error->ttl;
	reply[IP_OFF_PROTO] = IP_PROTO_ICMP;
	store_be32(reply + IP_OFF_SOURCE, tun_address);
	store_be32(reply + IP_OFF_DESTINATION, header->source);
	ip_store_checksum(reply, IP_MIN_HEADER_LEN);

	icmp[0] = error->type;
	icmp[1] = error->code;
	store_be32(icmp + 4, error->rest);
	memcpy(icmp + ICMP_HEADER_LEN, offender, quote_len);
	sums_store(icmp + 2, (uint16_t)~sums_fold(sums_portable(icmp, body_len)));
	return IP_MIN_HEADER_LEN + body_len;
}

uint32_t icmp_net_unreachable(const uint8_t *offender, const struct ip_header *header,
			      uint32_t tun_address, uint8_t *reply)
{
	const struct error error = {
		.type = TYPE_DEST_UNREACHABLE,
		.code = CODE_NET_UNREACHABLE,
		.ttl = FLANNEL_TTL,
		.quote_len = (uint16_t)(header->header_len + FLANNEL_QUOTE_LEN),
	};

	if (!may_answer(offender, header))
		return 0;
	return build(offender, header, tun_address, &error, reply);
}

uint32_t icmp_time_exceeded(const uint8_t *offender, const struct ip_header *header,
			    uint32_t tun_address, uint8_t *reply)
{
	const struct error error = {
		.type = TYPE_TIME_EXCEEDED,
		.code = CODE_TTL_EXCEEDED,
		.ttl = DEFAULT_TTL,
		.tos = INTERNETWORK_CONTROL,
		.quote_len = LONG_QUOTE_LEN,
	};

	if (!may_answer(offender, header))
		return 0;
	return build(offender, header, tun_address, &error, reply);
}

uint32_t icmp_fragmentation_needed(const uint8_t *offender, const struct ip_header *header,
				   uint32_t tun_address, uint16_t mtu, uint8_t *reply)
{
	const struct error error = {
		.type = TYPE_DEST_UNREACHABLE,
		.code = CODE_FRAGMENTATION_NEEDED,
		.rest = mtu,
		.ttl = DEFAULT_TTL,
		.tos = INTERNETWORK_CONTROL,
		.quote_len = LONG_QUOTE_LEN,
	};

	if (!may_answer(offender, header))
		return 0;
	return build(offender, header, tun_address, &error, reply);
}
