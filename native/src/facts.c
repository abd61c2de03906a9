/* The facts of a packet, for filters. Broken packets have fewer, never wrong ones. Python twin:
 * tundp/wire/facts.py. */
#include "transport.h"
#include "tundp_twins.h"

enum {
	PROTO_SCTP = 132,
	PORTS_LEN = 4,
	QUOTE_OFF = 8, /* an ICMP error's header, RFC 792 */
	DESTINATION = TUNDP_FIELD_DESTINATION - TUNDP_FIELD_SOURCE,
	PROTOCOL = TUNDP_FIELD_PROTOCOL - TUNDP_FIELD_SOURCE,
	SOURCE_PORT = TUNDP_FIELD_SOURCE_PORT - TUNDP_FIELD_SOURCE,
	DESTINATION_PORT = TUNDP_FIELD_DESTINATION_PORT - TUNDP_FIELD_SOURCE,
};

/* A transport header and what follows, as far as it is there; `len` may be 0. */
struct transport {
	const uint8_t *at;
	size_t len;
};

static void set(struct tundp_facts *facts, uint32_t field, uint32_t value)
{
	facts->present |= 1u << field;
	facts->values[field] = value;
}

static bool has_ports(uint8_t ip_proto)
{
	return ip_proto == PROTO_TCP || ip_proto == PROTO_UDP || ip_proto == PROTO_SCTP;
}

/* ICMP errors, which quote the packet they are about: types 3, 4, 5, 11 and 12. */
static bool is_quoting(uint8_t icmp_type)
{
	return (icmp_type >= 3 && icmp_type <= 5) || icmp_type == 11 || icmp_type == 12;
}

/* Adds a packet's addresses, protocol and ports as the fields from `first` on. False if it has
 * none; `header` and `transport` are set else. */
static bool add_header(struct tundp_facts *facts, uint32_t first, const uint8_t *packet,
		       size_t len, struct ip_header *header, struct transport *transport)
{
	size_t end;

	if (len < IP_MIN_HEADER_LEN || packet[0] >> 4 != 4)
		return false;
	ip_read(packet, header);
	set(facts, first, header->source);
	set(facts, first + DESTINATION, header->destination);
	set(facts, first + PROTOCOL, header->ip_proto);
	transport->len = 0;
	end = header->total_len < len ? header->total_len : len;
	if (header->header_len < IP_MIN_HEADER_LEN || header->header_len > end ||
	    (header->flags_offset & IP_OFFSET_MASK))
		return true;
	transport->at = packet + header->header_len;
	transport->len = end - header->header_len;
	if (has_ports(header->ip_proto) && transport->len >= PORTS_LEN) {
		set(facts, first + SOURCE_PORT, load_be16(transport->at));
		set(facts, first + DESTINATION_PORT, load_be16(transport->at + 2));
	}
	return true;
}

void tundp_facts_of(const uint8_t *packet, size_t captured, uint32_t length,
		    struct tundp_facts *facts)
{
	struct transport transport, unused;
	struct ip_header header, quoted;

	*facts = (struct tundp_facts){ 0 };
	set(facts, TUNDP_FIELD_LENGTH, length);
	if (!add_header(facts, TUNDP_FIELD_SOURCE, packet, captured, &header, &transport))
		return;
	set(facts, TUNDP_FIELD_FRAGMENT,
	    (header.flags_offset & (IP_FLAG_MF | IP_OFFSET_MASK)) != 0);
	if (header.ip_proto == PROTO_TCP && transport.len > TCP_OFF_FLAGS)
		set(facts, TUNDP_FIELD_TCP_FLAGS, transport.at[TCP_OFF_FLAGS]);
	if (header.ip_proto == IP_PROTO_ICMP && transport.len > QUOTE_OFF &&
	    is_quoting(transport.at[0]))
		add_header(facts, TUNDP_FIELD_QUOTED_SOURCE, transport.at + QUOTE_OFF,
			   transport.len - QUOTE_OFF, &quoted, &unused);
}

void tundp_facts_event(struct tundp_facts *facts, uint32_t direction, uint32_t outer,
		       int is_dropped, uint32_t reason)
{
	const uint32_t of_packet = ~(1u << TUNDP_FIELD_OUTER | 1u << TUNDP_FIELD_REASON);

	facts->present &= of_packet;
	facts->values[TUNDP_FIELD_OUTER] = 0;
	facts->values[TUNDP_FIELD_REASON] = 0;
	set(facts, TUNDP_FIELD_DIRECTION, direction);
	if (outer)
		set(facts, TUNDP_FIELD_OUTER, outer);
	if (is_dropped)
		set(facts, TUNDP_FIELD_REASON, reason);
}
