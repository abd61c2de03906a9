/* Merging packets of one flow into super-packets. Python twin: tundp/wire/coalesce.py, which is
 * the specification and has the reasons for each rule.
 *
 * A packet that may begin a super-packet is copied into its item's buffer while its checksum
 * is verified, and so is the payload of one that joins: nothing is walked twice. */
#include "coalesce.h"

#include <arpa/inet.h>

enum {
	IP_OFF_TOS = 1,
	IP_OFF_ID = 4,
	KEY_LEN = 12, /* addresses and ports */
	MERGED_FLAGS = TCP_ACK | TCP_ECE,
	ALLOWED_FLAGS = MERGED_FLAGS | TCP_PSH,
};

static void miss(struct coalescer *coalescer, enum tundp_miss reason)
{
	coalescer->misses[reason]++;
}

static void write_alone(struct coalescer *coalescer, uint8_t *packet, size_t len, uint64_t bytes_in)
{
	const struct coalesced one = { .packet = packet,
				       .len = len,
				       .count = 1,
				       .bytes_in = bytes_in,
				       .origin = coalescer->origin,
				       .last_id = coalescer->origin.packet_id };

	coalescer->write(coalescer->context, &one);
}

static void write_item(struct coalescer *coalescer, const struct coalesce_item *item)
{
	const bool is_tcp = item->ip_proto == PROTO_TCP;
	const uint16_t offset = is_tcp ? TCP_OFF_CHECKSUM : UDP_OFF_CHECKSUM;
	struct coalesced whole = {
		.packet = item->buffer + TUNDP_VNET_LEN,
		.len = item->len,
		.count = item->count,
		.bytes_in = item->bytes_in,
		.origin = item->origin,
		.last_id = item->last_id,
	};
	uint8_t *packet = whole.packet;
	size_t transport_len = item->len - IP_MIN_HEADER_LEN;

	if (item->count > 1) {
		store_be16(packet + IP_OFF_TOTAL_LEN, (uint16_t)item->len);
		ip_store_checksum(packet, IP_MIN_HEADER_LEN);
		if (!is_tcp)
			store_be16(packet + IP_MIN_HEADER_LEN + UDP_OFF_LEN,
				   (uint16_t)transport_len);
		sums_store(packet + IP_MIN_HEADER_LEN + offset,
			   sums_fold(pseudo_sum(packet, transport_len)));
		whole.vnet.flags = TUNDP_VNET_NEEDS_CSUM;
		whole.vnet.gso_type = is_tcp ? TUNDP_VNET_TCPV4 : TUNDP_VNET_UDP_L4;
		whole.vnet.hdr_len = item->header_len;
		whole.vnet.gso_size = (uint16_t)item->gso_size;
		whole.vnet.csum_start = IP_MIN_HEADER_LEN;
		whole.vnet.csum_offset = offset;
	}
	coalescer->write(coalescer->context, &whole);
}

/* Writes one item and gives its buffer back; the others keep their order. */
static void close_item(struct coalescer *coalescer, struct coalesce_item *item)
{
	uint8_t *buffer = item->buffer;

	write_item(coalescer, item);
	coalescer->item_count--;
	for (; item < coalescer->items + coalescer->item_count; item++)
		*item = item[1];
	item->buffer = buffer;
}

void coalesce_flush(struct coalescer *coalescer)
{
	const uint32_t count = coalescer->item_count;

	for (uint32_t i = 0; i < count; i++)
		write_item(coalescer, &coalescer->items[i]);
	coalescer->item_count = 0;
}

/* The item of the packet's flow, newest first: consecutive packets mostly belong to the most
 * recent flow. */
static struct coalesce_item *find(struct coalescer *coalescer, const uint8_t *packet)
{
	for (uint32_t i = coalescer->item_count; i-- > 0;) {
		struct coalesce_item *item = &coalescer->items[i];

		if (item->ip_proto == packet[IP_OFF_PROTO] &&
		    !memcmp(item->buffer + TUNDP_VNET_LEN + IP_OFF_SOURCE, packet + IP_OFF_SOURCE,
			    KEY_LEN))
			return item;
	}
	return NULL;
}

static void pass_before_all(struct coalescer *coalescer, uint8_t *packet, size_t len,
			    uint64_t bytes_in, enum tundp_miss reason)
{
	miss(coalescer, reason);
	coalesce_flush(coalescer);
	write_alone(coalescer, packet, len, bytes_in);
}

static void pass_before_flow(struct coalescer *coalescer, uint8_t *packet, size_t len,
			     uint64_t bytes_in, enum tundp_miss reason)
{
	struct coalesce_item *item = find(coalescer, packet);

	miss(coalescer, reason);
	if (item)
		close_item(coalescer, item);
	write_alone(coalescer, packet, len, bytes_in);
}

static bool has_same_headers(const uint8_t *first, const uint8_t *packet, size_t header_len,
			     bool is_tcp)
{
	const uint8_t *a = first + IP_MIN_HEADER_LEN, *b = packet + IP_MIN_HEADER_LEN;

	if (first[IP_OFF_TOS] != packet[IP_OFF_TOS] ||
	    sums_load(first + IP_OFF_FLAGS) != sums_load(packet + IP_OFF_FLAGS) ||
	    first[IP_OFF_TTL] != packet[IP_OFF_TTL])
		return false;
	if (!is_tcp)
		return true;
	return !memcmp(a + TCP_OFF_ACK, b + TCP_OFF_ACK, TCP_OFF_FLAGS - TCP_OFF_ACK) &&
	       !((a[TCP_OFF_FLAGS] ^ b[TCP_OFF_FLAGS]) & MERGED_FLAGS) &&
	       sums_load(a + TCP_OFF_WINDOW) == sums_load(b + TCP_OFF_WINDOW) &&
	       !memcmp(a + TCP_OFF_URGENT, b + TCP_OFF_URGENT,
		       header_len - IP_MIN_HEADER_LEN - TCP_OFF_URGENT);
}

/* TUNDP_MISS_COUNT if `packet` can be the next of `item`, else why not. */
static enum tundp_miss why_not(const struct coalescer *coalescer, const struct coalesce_item *item,
			       const uint8_t *packet, size_t len, size_t header_len)
{
	const uint8_t *first = item->buffer + TUNDP_VNET_LEN;
	const bool is_tcp = item->ip_proto == PROTO_TCP;
	const size_t payload_len = len - header_len;

	if (header_len != item->header_len || !has_same_headers(first, packet, header_len, is_tcp))
		return TUNDP_MISS_HEADER_DIFFERS;
	if (payload_len > item->gso_size)
		return TUNDP_MISS_SIZE;
	if (is_tcp && load_be32(packet + IP_MIN_HEADER_LEN + TCP_OFF_SEQ) != item->next_seq)
		return TUNDP_MISS_SEQUENCE;
	if (!(load_be16(packet + IP_OFF_FLAGS) & IP_FLAG_DF) &&
	    load_be16(packet + IP_OFF_ID) != item->next_id)
		return TUNDP_MISS_SEQUENCE;
	if (item->count == (is_tcp ? TUNDP_COALESCE_TCP_SEGMENTS : coalescer->max_udp_segments) ||
	    item->len + payload_len > IP_MAX_LEN)
		return TUNDP_MISS_FULL;
	return TUNDP_MISS_COUNT;
}

/* Copies the payload to `to` and verifies the transport checksum on the way. */
static bool copy_payload(const struct coalescer *coalescer, uint8_t *to, const uint8_t *packet,
			 size_t len, size_t header_len)
{
	uint64_t sum = coalescer->sums->copy(to, packet + header_len, len - header_len);

	sum += sums_portable(packet + IP_MIN_HEADER_LEN, header_len - IP_MIN_HEADER_LEN);
	return sums_fold(sum + pseudo_sum(packet, len - IP_MIN_HEADER_LEN)) == 0xffff;
}

static bool is_valid(const struct coalescer *coalescer, const uint8_t *packet, size_t len)
{
	const size_t transport_len = len - IP_MIN_HEADER_LEN;
	uint64_t sum = coalescer->sums->sum(packet + IP_MIN_HEADER_LEN, transport_len);

	return sums_fold(sum + pseudo_sum(packet, transport_len)) == 0xffff;
}

static void add(struct coalescer *coalescer, uint8_t *packet, size_t len, size_t header_len,
		uint64_t bytes_in)
{
	struct coalesce_item *item = find(coalescer, packet);
	const bool is_tcp = packet[IP_OFF_PROTO] == PROTO_TCP;
	const size_t payload_len = len - header_len;
	const bool is_pushed = is_tcp && packet[IP_MIN_HEADER_LEN + TCP_OFF_FLAGS] & TCP_PSH;
	uint8_t *first;

	if (item) {
		enum tundp_miss reason = why_not(coalescer, item, packet, len, header_len);

		if (reason == TUNDP_MISS_COUNT) {
			first = item->buffer + TUNDP_VNET_LEN;
			if (!copy_payload(coalescer, first + item->len, packet, len, header_len)) {
				pass_before_flow(coalescer, packet, len, bytes_in,
						 TUNDP_MISS_BAD_CHECKSUM);
				return;
			}
			item->len += (uint32_t)payload_len;
			item->count++;
			item->last_id = coalescer->origin.packet_id;
			item->bytes_in += bytes_in;
			item->next_seq += (uint32_t)payload_len;
			item->next_id++;
			if (is_pushed)
				first[IP_MIN_HEADER_LEN + TCP_OFF_FLAGS] |= TCP_PSH;
			if (is_pushed || payload_len < item->gso_size)
				close_item(coalescer, item);
			return;
		}
		miss(coalescer, reason);
		close_item(coalescer, item);
	}
	if (is_pushed) {
		/* Nothing may follow it in one super-packet. */
		if (!is_valid(coalescer, packet, len))
			miss(coalescer, TUNDP_MISS_BAD_CHECKSUM);
		write_alone(coalescer, packet, len, bytes_in);
		return;
	}
	/* There is always a free item; it counts once the packet proves sound. */
	item = &coalescer->items[coalescer->item_count];
	first = item->buffer + TUNDP_VNET_LEN;
	if (!copy_payload(coalescer, first + header_len, packet, len, header_len)) {
		miss(coalescer, TUNDP_MISS_BAD_CHECKSUM);
		write_alone(coalescer, packet, len, bytes_in);
		return;
	}
	memcpy(first, packet, header_len);
	item->len = (uint32_t)len;
	item->gso_size = (uint32_t)payload_len;
	item->next_seq = is_tcp ? load_be32(packet + IP_MIN_HEADER_LEN + TCP_OFF_SEQ) : 0;
	item->next_seq += (uint32_t)payload_len;
	item->count = 1;
	item->bytes_in = bytes_in;
	item->origin = coalescer->origin;
	item->last_id = coalescer->origin.packet_id;
	item->next_id = (uint16_t)(load_be16(packet + IP_OFF_ID) + 1);
	item->header_len = (uint16_t)header_len;
	item->ip_proto = packet[IP_OFF_PROTO];
	coalescer->item_count++;
	if (coalescer->item_count > TUNDP_COALESCE_ITEMS)
		close_item(coalescer, &coalescer->items[0]);
}

static void add_tcp(struct coalescer *coalescer, uint8_t *packet, size_t len, uint64_t bytes_in)
{
	const uint8_t *tcp = packet + IP_MIN_HEADER_LEN;
	const size_t room = len - IP_MIN_HEADER_LEN;
	size_t tcp_len = 0;

	if (room >= TCP_MIN_HEADER_LEN)
		tcp_len = (size_t)(tcp[TCP_OFF_DATA] >> 4) * 4;
	if (tcp_len < TCP_MIN_HEADER_LEN || tcp_len > room)
		pass_before_all(coalescer, packet, len, bytes_in, TUNDP_MISS_BAD_TRANSPORT);
	else if (!(tcp[TCP_OFF_FLAGS] & TCP_ACK) || tcp[TCP_OFF_FLAGS] & ~ALLOWED_FLAGS ||
		 tcp[TCP_OFF_DATA] & 0x0f)
		pass_before_flow(coalescer, packet, len, bytes_in, TUNDP_MISS_TCP_FLAGS);
	else if (tcp_len == room)
		pass_before_flow(coalescer, packet, len, bytes_in, TUNDP_MISS_NO_PAYLOAD);
	else
		add(coalescer, packet, len, IP_MIN_HEADER_LEN + tcp_len, bytes_in);
}

static void add_udp(struct coalescer *coalescer, uint8_t *packet, size_t len, uint64_t bytes_in)
{
	const uint8_t *udp = packet + IP_MIN_HEADER_LEN;
	const size_t room = len - IP_MIN_HEADER_LEN;

	if (room < UDP_HEADER_LEN)
		pass_before_all(coalescer, packet, len, bytes_in, TUNDP_MISS_BAD_TRANSPORT);
	else if (load_be16(udp + UDP_OFF_LEN) != room)
		pass_before_flow(coalescer, packet, len, bytes_in, TUNDP_MISS_BAD_TRANSPORT);
	else if (room == UDP_HEADER_LEN)
		pass_before_flow(coalescer, packet, len, bytes_in, TUNDP_MISS_NO_PAYLOAD);
	else if (sums_load(udp + UDP_OFF_CHECKSUM) == 0)
		pass_before_flow(coalescer, packet, len, bytes_in, TUNDP_MISS_NO_CHECKSUM);
	else
		add(coalescer, packet, len, IP_MIN_HEADER_LEN + UDP_HEADER_LEN, bytes_in);
}

void coalesce_add(struct coalescer *coalescer, uint8_t *packet, size_t len, uint64_t bytes_in)
{
	const size_t header_len = (size_t)(packet[0] & 0x0f) * 4;
	const bool is_tcp = packet[IP_OFF_PROTO] == PROTO_TCP;

	if (load_be16(packet + IP_OFF_FLAGS) & (IP_FLAG_MF | IP_OFFSET_MASK)) {
		pass_before_all(coalescer, packet, len, bytes_in, TUNDP_MISS_FRAGMENT);
	} else if (!is_tcp && packet[IP_OFF_PROTO] != PROTO_UDP) {
		miss(coalescer, TUNDP_MISS_NOT_TRANSPORT);
		write_alone(coalescer, packet, len, bytes_in);
	} else if (header_len != IP_MIN_HEADER_LEN) {
		pass_before_all(coalescer, packet, len, bytes_in, TUNDP_MISS_IP_OPTIONS);
	} else if (!(is_tcp ? coalescer->is_tcp_on : coalescer->is_udp_on)) {
		miss(coalescer, TUNDP_MISS_OFF);
		write_alone(coalescer, packet, len, bytes_in);
	} else if (is_tcp) {
		add_tcp(coalescer, packet, len, bytes_in);
	} else {
		add_udp(coalescer, packet, len, bytes_in);
	}
}
