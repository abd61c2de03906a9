/* Segmentation: checksums completed, super-packets cut. Python twin: tundp/wire/segment.py, which
 * is the specification.
 *
 * Only the payload is walked per packet: the words of the headers that stay the same are
 * summed once, the others added for each. */
#include "segment.h"

#include <arpa/inet.h>

enum {
	IP_OFF_ID = 4,
};

static bool begin_plain(struct segmenter *segmenter, const struct tundp_vnet *vnet,
			const uint8_t *packet, size_t len, uint32_t *reason)
{
	size_t field = (size_t)vnet->csum_start + vnet->csum_offset;

	segmenter->payload = packet;
	segmenter->payload_len = len;
	segmenter->count = 1;
	segmenter->gso_size = 0;
	segmenter->has_checksum = vnet->flags & TUNDP_VNET_NEEDS_CSUM;
	if (!segmenter->has_checksum)
		return true;
	if (field + 2 > len) {
		*reason = TUNDP_DROP_BAD_VNET_HEADER;
		return false;
	}
	segmenter->csum_start = vnet->csum_start;
	segmenter->csum_field = (uint32_t)field;
	segmenter->seed = sums_load(packet + field);
	segmenter->is_tcp = vnet->csum_offset != UDP_OFF_CHECKSUM;
	return true;
}

bool segment_begin(struct segmenter *segmenter, const struct tundp_sums *sums,
		   const struct tundp_vnet *vnet, const uint8_t *packet, size_t len,
		   uint32_t *reason)
{
	const uint8_t kind = (uint8_t)(vnet->gso_type & ~TUNDP_VNET_ECN);
	const bool is_tcp = kind == TUNDP_VNET_TCPV4;
	struct ip_header ip;
	size_t transport_len;
	uint8_t *header = segmenter->header;
	const uint8_t *transport;

	segmenter->sums = sums;
	segmenter->number = 0;
	if (vnet->gso_type == TUNDP_VNET_NONE)
		return begin_plain(segmenter, vnet, packet, len, reason);
	*reason = TUNDP_DROP_BAD_VNET_HEADER;
	if (kind != TUNDP_VNET_TCPV4 && kind != TUNDP_VNET_TCPV6 && kind != TUNDP_VNET_UDP_L4)
		return false;
	if (!ip_parse(packet, len, &ip, reason))
		return false;
	*reason = TUNDP_DROP_BAD_VNET_HEADER;
	if (kind == TUNDP_VNET_TCPV6 || ip.ip_proto != (is_tcp ? PROTO_TCP : PROTO_UDP) ||
	    ip.flags_offset & (IP_FLAG_MF | IP_OFFSET_MASK) ||
	    !(vnet->flags & TUNDP_VNET_NEEDS_CSUM) || vnet->gso_size == 0 ||
	    vnet->csum_start != ip.header_len ||
	    vnet->csum_offset != (is_tcp ? TCP_OFF_CHECKSUM : UDP_OFF_CHECKSUM))
		return false;
	transport = packet + ip.header_len;
	len = (size_t)ip.total_len - ip.header_len;
	if (len < (is_tcp ? TCP_MIN_HEADER_LEN : UDP_HEADER_LEN))
		return false;
	transport_len = is_tcp ? (size_t)(transport[TCP_OFF_DATA] >> 4) * 4 : UDP_HEADER_LEN;
	if (transport_len > len || (is_tcp && transport_len < TCP_MIN_HEADER_LEN))
		return false;

	segmenter->header_len = (uint16_t)(ip.header_len + transport_len);
	segmenter->ip_header_len = ip.header_len;
	segmenter->payload = packet + segmenter->header_len;
	segmenter->payload_len = len - transport_len;
	segmenter->gso_size = vnet->gso_size;
	segmenter->count =
		(uint32_t)((segmenter->payload_len + vnet->gso_size - 1) / vnet->gso_size);
	if (segmenter->count == 0)
		segmenter->count = 1;
	segmenter->is_tcp = is_tcp;
	segmenter->csum_field =
		ip.header_len + (uint32_t)(is_tcp ? TCP_OFF_CHECKSUM : UDP_OFF_CHECKSUM);

	/* The template has zeros wherever packets differ. */
	memcpy(header, packet, segmenter->header_len);
	segmenter->id = load_be16(header + IP_OFF_ID);
	memset(header + IP_OFF_TOTAL_LEN, 0, 4);
	sums_store(header + IP_OFF_CHECKSUM, 0);
	sums_store(header + segmenter->csum_field, 0);
	transport = header + ip.header_len;
	if (is_tcp) {
		segmenter->seq = load_be32(transport + TCP_OFF_SEQ);
		segmenter->flags = transport[TCP_OFF_FLAGS];
		memset(header + ip.header_len + TCP_OFF_SEQ, 0, 4);
		header[ip.header_len + TCP_OFF_FLAGS] = 0;
	} else {
		memset(header + ip.header_len + UDP_OFF_LEN, 0, 2);
	}
	segmenter->ip_sum = sums_portable(header, ip.header_len);
	segmenter->transport_sum = pseudo_sum(header, 0) + sums_portable(transport, transport_len);
	return true;
}

void segment_lower_ttl(struct segmenter *segmenter)
{
	if (!segmenter->gso_size)
		return;
	segmenter->header[IP_OFF_TTL]--;
	segmenter->ip_sum = sums_portable(segmenter->header, segmenter->ip_header_len);
}

static size_t next_plain(struct segmenter *segmenter, uint8_t *out)
{
	const size_t len = segmenter->payload_len;
	const size_t start = segmenter->csum_start;
	uint8_t *field = out + segmenter->csum_field;
	uint64_t sum;

	if (!segmenter->has_checksum) {
		memcpy(out, segmenter->payload, len);
		return len;
	}
	/* The seed lies in the field, and is summed with the rest. */
	memcpy(out, segmenter->payload, start);
	sum = segmenter->sums->copy(out + start, segmenter->payload + start, len - start);
	if ((segmenter->csum_field - start) & 1) {
		/* A checksum field at an odd offset straddles two 16-bit words: recompute with
		 * the field zeroed. */
		sums_store(field, 0);
		sum = sums_portable(out + start, len - start) + segmenter->seed;
	}
	store_transport_checksum(field, sum, !segmenter->is_tcp);
	return len;
}

size_t segment_next(struct segmenter *segmenter, uint8_t *out)
{
	const size_t header_len = segmenter->header_len;
	const size_t ip_header_len = segmenter->ip_header_len;
	const bool is_last = segmenter->number + 1 == segmenter->count;
	uint8_t *transport = out + ip_header_len;
	size_t piece, transport_len;
	uint64_t sum;

	if (!segmenter->gso_size)
		return next_plain(segmenter, out);
	piece = is_last ? segmenter->payload_len : segmenter->gso_size;
	transport_len = header_len - ip_header_len + piece;
	memcpy(out, segmenter->header, header_len);
	sum = segmenter->sums->copy(out + header_len, segmenter->payload, piece);

	store_be16(out + IP_OFF_TOTAL_LEN, (uint16_t)(header_len + piece));
	store_be16(out + IP_OFF_ID, segmenter->id);
	sums_store(out + IP_OFF_CHECKSUM,
		   (uint16_t)~sums_fold(segmenter->ip_sum + sums_load(out + IP_OFF_TOTAL_LEN) +
					sums_load(out + IP_OFF_ID)));
	sum += segmenter->transport_sum + htons((uint16_t)transport_len);
	if (segmenter->is_tcp) {
		uint8_t flags = segmenter->flags;

		if (!is_last)
			flags &= (uint8_t)~(TCP_FIN | TCP_PSH);
		if (segmenter->number)
			flags &= (uint8_t)~TCP_CWR;
		store_be32(transport + TCP_OFF_SEQ, segmenter->seq);
		transport[TCP_OFF_FLAGS] = flags;
		sum += sums_load32(transport + TCP_OFF_SEQ) + htons(flags);
		segmenter->seq += segmenter->gso_size;
	} else {
		store_be16(transport + UDP_OFF_LEN, (uint16_t)transport_len);
		sum += htons((uint16_t)transport_len);
	}
	store_transport_checksum(out + segmenter->csum_field, sum, !segmenter->is_tcp);
	segmenter->payload += piece;
	segmenter->payload_len -= piece;
	segmenter->id++;
	segmenter->number++;
	return header_len + piece;
}
