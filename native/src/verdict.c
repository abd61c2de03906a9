/* The verdicts on one packet. Python twin: tundp/wire/encap.py, which is the specification. */
#include "fib.h"
#include "icmp.h"
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

void tundp_decapsulate(const struct tundp_fib *fib, const struct tundp_policy *policy,
		       uint8_t *datagram, size_t len, uint32_t outer_source,
		       struct tundp_verdict *verdict)
{
	struct ip_header header;
	uint32_t reason;
	const bool is_checked = policy->source_check != TUNDP_SOURCE_OFF;
	bool source_matches, destination_matches;

	if (!ip_parse(datagram, len, &header, &reason)) {
		drop(verdict, reason);
		return;
	}
	if (!ip_is_single_host(header.source) || fib_is_own(fib, header.source)) {
		drop(verdict, TUNDP_DROP_MARTIAN_SOURCE);
		return;
	}
	source_matches = !is_checked || fib_admits(fib, header.source, outer_source);
	if (!source_matches && policy->source_check == TUNDP_SOURCE_ENFORCE) {
		drop(verdict, TUNDP_DROP_SOURCE_MISMATCH);
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
	verdict->source_matches = source_matches;
	verdict->destination_matches = destination_matches;
}
