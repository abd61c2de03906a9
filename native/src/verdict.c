/* The verdicts on one packet. Python twin: tundp/wire/encap.py, which is the specification. */
#include "fib.h"
#include "icmp.h"
#include "transport.h"
#include "tundp_twins.h"

static void drop(struct tundp_verdict *verdict, uint32_t reason)
{
	verdict->kind = TUNDP_DROP;
	verdict->reason = reason;
}

static void answer(struct tundp_verdict *verdict, uint32_t reason, uint32_t reply_len)
{
	verdict->kind = reply_len ? TUNDP_REPLY : TUNDP_DROP;
	verdict->reason = reason;
	verdict->reply_len = reply_len;
}

void tundp_encapsulate(const struct tundp_fib *fib, const struct tundp_policy *policy,
		       uint8_t *packet, size_t len, struct tundp_verdict *verdict)
{
	struct ip_header header;
	uint32_t hop, reason;
	uint16_t mtu;

	verdict->hop = 0;
	if (!ip_parse(packet, len, &header, &reason)) {
		drop(verdict, reason);
		return;
	}
	hop = fib_lookup(fib, header.destination);
	if (hop == 0 || fib->hops[hop].flags & TUNDP_HOP_LOCAL) {
		answer(verdict, hop == 0 ? TUNDP_DROP_NO_ROUTE : TUNDP_DROP_OWN_SUBNET,
		       icmp_net_unreachable(packet, &header, policy->tun_address, verdict->reply));
		return;
	}
	verdict->hop = hop;
	if (header.ttl <= 1) {
		answer(verdict, TUNDP_DROP_HOP_LIMIT_EXCEEDED,
		       icmp_time_exceeded(packet, &header, policy->tun_address, verdict->reply));
		return;
	}
	mtu = fib_path_mtu(&fib->paths[hop]);
	if (mtu == 0)
		mtu = IP_MAX_LEN;
	if (header.total_len > mtu && header.flags_offset & IP_FLAG_DF) {
		answer(verdict, TUNDP_DROP_TOO_BIG,
		       icmp_fragmentation_needed(packet, &header, policy->tun_address, mtu,
						 verdict->reply));
		return;
	}
	ip_decrement_ttl(packet, &header);
	verdict->kind = TUNDP_FORWARD;
	verdict->len = header.total_len;
	verdict->fragment_mtu = header.total_len > mtu ? mtu : 0;
}

void tundp_narrow(const struct tundp_policy *policy, const uint8_t *packet, uint32_t hop,
		  uint16_t mtu, struct tundp_verdict *verdict)
{
	struct ip_header header;
	uint8_t offender[TUNDP_REPLY_MAX];

	ip_read(packet, &header);
	verdict->kind = TUNDP_FORWARD;
	verdict->hop = hop;
	verdict->len = header.total_len;
	verdict->fragment_mtu = 0;
	if (mtu == 0 || header.total_len <= mtu)
		return;
	if (!(header.flags_offset & IP_FLAG_DF)) {
		verdict->fragment_mtu = mtu;
		return;
	}
	/* What the error quotes is the packet as it came. */
	memcpy(offender, packet,
	       header.total_len < sizeof(offender) ? header.total_len : sizeof(offender));
	ip_restore_ttl(offender, &header);
	answer(verdict, TUNDP_DROP_TOO_BIG,
	       icmp_fragmentation_needed(offender, &header, policy->tun_address, mtu,
					 verdict->reply));
}

/* Where no reason to drop was found. */
#define NO_REASON TUNDP_DROP_COUNT

static bool is_host(const struct tundp_fib *fib, uint32_t address)
{
	return ip_is_single_host(address) && !fib_is_broadcast(fib, address);
}

/* Whether an inner packet is a datagram, or its first fragment, for the overlay's port of a
 * node. */
static bool is_for_tunnel(const struct tundp_fib *fib, const struct tundp_policy *policy,
			  const uint8_t *packet, const struct ip_header *header)
{
	return header->ip_proto == PROTO_UDP && !(header->flags_offset & IP_OFFSET_MASK) &&
	       header->total_len >= header->header_len + 4 &&
	       load_be16(packet + header->header_len + 2) == policy->port &&
	       (header->destination == policy->tun_address ||
		fib_is_node(fib, header->destination));
}

static bool is_admitted(const struct tundp_policy *policy, uint32_t source)
{
	for (uint16_t i = 0; i < policy->admitted_count; i++)
		if (!((source ^ policy->admitted[i].address) & policy->admitted[i].mask))
			return true;
	return false;
}

/* Why who sent a datagram may not send what comes from `source`, or NO_REASON. */
static uint32_t sender_fault(const struct tundp_fib *fib, const struct tundp_policy *policy,
			     uint32_t source, uint32_t outer_source, uint16_t outer_port)
{
	uint32_t hop = fib_holder(fib, source);

	if (hop == 0 && is_admitted(policy, source))
		hop = fib_hop_of_peer(fib, outer_source);
	/* Of our own subnet, hop or none, the address is 0: no peer's. */
	if (hop == 0 || fib->hops[hop].flags & TUNDP_HOP_LOCAL ||
	    fib->hops[hop].address != outer_source)
		return TUNDP_DROP_SOURCE_MISMATCH;
	return fib->hops[hop].port == outer_port ? NO_REASON : TUNDP_DROP_SOURCE_PORT_MISMATCH;
}

/* How many bytes of a packet for us show an answer to what measures paths: up to the cookie of an
 * ICMP echo reply (RFC 792) with our identifier, whole or its first fragment. 0: it is none. */
static uint32_t echo_len(const struct tundp_policy *policy, const uint8_t *packet,
			 const struct ip_header *header)
{
	const uint32_t len = header->header_len + TUNDP_ECHO_HEAD_LEN;

	if (header->ip_proto != IP_PROTO_ICMP || header->destination != policy->tun_address ||
	    header->flags_offset & IP_OFFSET_MASK || header->total_len < len)
		return 0;
	/* Type and code, both 0. */
	if (load_be16(packet + header->header_len) != 0 ||
	    load_be16(packet + header->header_len + 4) != policy->echo_id)
		return 0;
	return len;
}

enum {
	ICMP_LEN = 8,
	ICMP_PROTOCOL_UNREACHABLE = 0x0302, /* type and code */
	QUOTED_LEN = 8, /* bytes an ICMP error quotes behind the header, at least (RFC 792) */
};

/* Bytes of an ICMP protocol unreachable about a message of ours, up to the first 8 of it that are
 * quoted. 0: it is none. */
static uint32_t refusal_len(const struct tundp_policy *policy, const uint8_t *packet,
			    const struct ip_header *header)
{
	const uint32_t quoted = header->header_len + ICMP_LEN;
	uint32_t len, quoted_header_len;

	if (header->total_len < quoted + IP_MIN_HEADER_LEN + QUOTED_LEN)
		return 0;
	quoted_header_len = (packet[quoted] & 0x0fu) * 4;
	len = quoted + quoted_header_len + QUOTED_LEN;
	if (load_be16(packet + header->header_len) != ICMP_PROTOCOL_UNREACHABLE ||
	    packet[quoted] >> 4 != 4 || quoted_header_len < IP_MIN_HEADER_LEN ||
	    header->total_len < len || packet[quoted + IP_OFF_PROTO] != TUNDP_PEER_PROTO ||
	    load_be32(packet + quoted + IP_OFF_SOURCE) != policy->tun_address)
		return 0;
	return len;
}

/* How many bytes of a packet for us are of the talk between nodes: a message, or a kernel's answer
 * that it knows none. 0: it is neither, a fragment, or not of who may send from its source. */
static uint32_t peer_len(const struct tundp_fib *fib, const struct tundp_policy *policy,
			 const uint8_t *packet, const struct ip_header *header,
			 uint32_t outer_source, uint16_t outer_port)
{
	uint32_t len;

	if (header->destination != policy->tun_address ||
	    (header->ip_proto != TUNDP_PEER_PROTO && header->ip_proto != IP_PROTO_ICMP) ||
	    header->flags_offset & (IP_FLAG_MF | IP_OFFSET_MASK))
		return 0;
	if (header->ip_proto == IP_PROTO_ICMP)
		len = refusal_len(policy, packet, header);
	else
		len = header->total_len <= TUNDP_PEER_PACKET_MAX ? header->total_len : 0;
	if (!len || sender_fault(fib, policy, header->source, outer_source, outer_port) != NO_REASON)
		return 0;
	return len;
}

void tundp_decapsulate(const struct tundp_fib *fib, const struct tundp_policy *policy,
		       uint8_t *datagram, size_t len, uint32_t outer_source, uint16_t outer_port,
		       struct tundp_verdict *verdict)
{
	struct ip_header header;
	uint32_t reason, fault;
	const bool is_checked = policy->source_check != TUNDP_SOURCE_OFF;
	bool destination_matches;

	if (!ip_parse(datagram, len, &header, &reason)) {
		drop(verdict, reason);
		return;
	}
	if (!is_host(fib, header.source) || fib_is_own(fib, header.source)) {
		drop(verdict, TUNDP_DROP_MARTIAN_SOURCE);
		return;
	}
	if (!is_host(fib, header.destination)) {
		drop(verdict, TUNDP_DROP_MARTIAN_DESTINATION);
		return;
	}
	if (is_for_tunnel(fib, policy, datagram, &header)) {
		drop(verdict, TUNDP_DROP_TUNNEL_IN_TUNNEL);
		return;
	}
	fault = is_checked ? sender_fault(fib, policy, header.source, outer_source, outer_port) :
			     NO_REASON;
	if (fault != NO_REASON && policy->source_check == TUNDP_SOURCE_ENFORCE) {
		drop(verdict, fault);
		return;
	}
	destination_matches = !is_checked || fib_is_own(fib, header.destination);
	if (!destination_matches && policy->source_check == TUNDP_SOURCE_ENFORCE) {
		drop(verdict, TUNDP_DROP_DESTINATION_MISMATCH);
		return;
	}
	if (header.ttl <= 1) {
		answer(verdict, TUNDP_DROP_HOP_LIMIT_EXCEEDED,
		       icmp_time_exceeded(datagram, &header, policy->tun_address, verdict->reply));
		return;
	}
	ip_decrement_ttl(datagram, &header);
	verdict->kind = TUNDP_DELIVER;
	verdict->len = header.total_len;
	verdict->source_matches = fault == NO_REASON;
	verdict->destination_matches = destination_matches;
	verdict->echo_len = echo_len(policy, datagram, &header);
	verdict->peer_len = peer_len(fib, policy, datagram, &header, outer_source, outer_port);
}
