/* ICMP errors about inner packets. Python twin: tundp/wire/icmp.py, which has the reasons. */
#ifndef TUNDP_ICMP_H
#define TUNDP_ICMP_H

#include "ip.h"

/* Each fills `reply` with one whole IPv4 packet about `offender` and returns its length, or
 * 0 where the RFCs forbid an answer. `header` is the offender's, already checked. */
uint32_t icmp_net_unreachable(const uint8_t *offender, const struct ip_header *header,
			      uint32_t tun_address, uint8_t *reply);
uint32_t icmp_time_exceeded(const uint8_t *offender, const struct ip_header *header,
			    uint32_t tun_address, uint8_t *reply);
uint32_t icmp_fragmentation_needed(const uint8_t *offender, const struct ip_header *header,
				   uint32_t tun_address, uint16_t mtu, uint8_t *reply);

#endif
