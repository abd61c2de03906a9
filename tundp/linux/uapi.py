"""Kernel constants the standard library lacks, each with its header."""

from __future__ import annotations

from typing import Final

# linux/if_tun.h
IFF_TUN: Final = 0x0001
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000
IFF_MULTI_QUEUE: Final = 0x0100
IFF_TUN_EXCL: Final = 0x8000
TUNSETOFFLOAD: Final = 0x400454D0
TUNGETFEATURES: Final = 0x800454CF
TUNGETIFF: Final = 0x800454D2
TUN_F_CSUM: Final = 0x01
TUN_F_TSO4: Final = 0x02
TUN_F_TSO6: Final = 0x04
TUN_F_TSO_ECN: Final = 0x08
TUN_F_USO4: Final = 0x20
TUN_F_USO6: Final = 0x40

# linux/udp.h
UDP_SEGMENT: Final = 103
UDP_GRO: Final = 104

# linux/in.h
IP_MTU_DISCOVER: Final = 10
IP_PMTUDISC_DO: Final = 2
IP_MTU: Final = 14

# asm-generic/socket.h
SO_RCVBUFFORCE: Final = 33
SO_SNDBUFFORCE: Final = 32
SO_RXQ_OVFL: Final = 40

# linux/socket.h: setsockopt levels
SOL_NETLINK: Final = 270

# linux/netlink.h
NETLINK_ROUTE: Final = 0
NETLINK_NETFILTER: Final = 12
NETLINK_NO_ENOBUFS: Final = 5
"""Since Linux 2.6.30: a full receive buffer is no error of the socket."""
NETLINK_CAP_ACK: Final = 10
"""Since Linux 4.3: acknowledgements without the payload of the request."""
NETLINK_EXT_ACK: Final = 11
"""Since Linux 4.12: acknowledgements with the kernel's reason in words."""
NETLINK_GET_STRICT_CHK: Final = 12
"""Since Linux 4.20: the kernel filters dumps by the fields of the request."""
NLM_F_REQUEST: Final = 0x001
NLM_F_ACK: Final = 0x004
NLM_F_DUMP_INTR: Final = 0x010
NLM_F_DUMP: Final = 0x300
NLM_F_REPLACE: Final = 0x100
NLM_F_EXCL: Final = 0x200
NLM_F_CREATE: Final = 0x400
NLM_F_CAPPED: Final = 0x100
NLM_F_ACK_TLVS: Final = 0x200
NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3
NLMSGERR_ATTR_MSG: Final = 1

# linux/rtnetlink.h
RTM_NEWROUTE: Final = 24
RTM_DELROUTE: Final = 25
RTM_GETROUTE: Final = 26
RTA_DST: Final = 1
RTA_OIF: Final = 4
RTA_GATEWAY: Final = 5
RTA_PRIORITY: Final = 6
RTA_PREFSRC: Final = 7
RTA_MULTIPATH: Final = 9
RTA_TABLE: Final = 15
RTNH_F_ONLINK: Final = 4
RTN_UNICAST: Final = 1
RTN_BLACKHOLE: Final = 6
RTN_UNREACHABLE: Final = 7
RTN_PROHIBIT: Final = 8
RTN_THROW: Final = 9
RT_SCOPE_UNIVERSE: Final = 0
RT_SCOPE_LINK: Final = 253
RT_SCOPE_HOST: Final = 254
RT_SCOPE_NOWHERE: Final = 255
RT_TABLE_UNSPEC: Final = 0
RT_TABLE_MAIN: Final = 254
RTPROT_BOOT: Final = 3

# linux/netfilter/nfnetlink.h
NFNLGRP_NFTABLES: Final = 7
"""Since Linux 3.14: told of every change of tables, chains, rules and sets."""
