/* The MTU of the device datagrams to an endpoint leave by. */
#ifndef TUNDP_DEVICE_MTU_H
#define TUNDP_DEVICE_MTU_H

#include "tundp.h"

/* linux/in.h, 3.14; absent from some libc headers. DF is clear, what ICMP errors say of the path is
 * ignored, and what is larger than the device's MTU is refused (EMSGSIZE). */
#ifndef IP_PMTUDISC_INTERFACE
#define IP_PMTUDISC_INTERFACE 4
#endif

/* Bytes of the largest IPv4 packet the device takes, 0 without a route. scratch: any
 * TUNDP_MAX_DATAGRAM_LEN bytes. Sends nothing. Takes eight system calls, which the caller counts. */
enum { DEVICE_MTU_SYSCALLS = 8 };
int device_mtu(uint32_t source, const struct tundp_hop *endpoint, const uint8_t *scratch);

#endif
