"""Kernel constants the standard library lacks, with their headers and the first Linux with each.

Without a version: older than 2.6. Numbers of asm-generic/socket.h are those of x86, Arm,
RISC-V, PowerPC and s390; Alpha, MIPS, PA-RISC and SPARC have others.
"""

from __future__ import annotations

from typing import Final

# linux/if_tun.h
IFF_TUN: Final = 0x0001
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000
"""2.6.27"""
IFF_MULTI_QUEUE: Final = 0x0100
"""3.8"""
IFF_TUN_EXCL: Final = 0x8000
"""2.6.30"""
TUNSETOWNER: Final = 0x400454CC
TUNSETOFFLOAD: Final = 0x400454D0
"""2.6.27"""
TUNGETIFF: Final = 0x800454D2
"""2.6.27"""
TUNGETFEATURES: Final = 0x800454CF
"""2.6.27"""
TUNGETDEVNETNS: Final = 0x54E3
"""5.2: a descriptor of the network namespace the device is in."""
TUN_F_CSUM: Final = 0x01
TUN_F_TSO4: Final = 0x02
TUN_F_TSO6: Final = 0x04
TUN_F_TSO_ECN: Final = 0x08
TUN_F_USO4: Final = 0x20
"""6.2"""
TUN_F_USO6: Final = 0x40
"""6.2"""

# linux/if.h
IFF_UP: Final = 0x1
IFF_LOOPBACK: Final = 0x8

# linux/sockios.h
SIOCSIFFLAGS: Final = 0x8914

# linux/if_ether.h
ETH_P_ALL: Final = 0x0003
ETH_P_IP: Final = 0x0800

# linux/if_packet.h
PACKET_STATISTICS: Final = 6
"""struct tpacket_stats: packets seen and dropped since it was last asked."""

# linux/udp.h
UDP_SEGMENT: Final = 103
"""4.18"""
UDP_GRO: Final = 104
"""5.0"""

# linux/in.h
IP_PKTINFO: Final = 8
IP_MTU_DISCOVER: Final = 10
IP_PMTUDISC_DONT: Final = 0
IP_PMTUDISC_PROBE: Final = 3
"""2.6.22: set DF, and ignore what is known of the path's MTU."""
IP_PMTUDISC_INTERFACE: Final = 4
"""3.14: clear DF, ignore what ICMP errors say of the path, refuse what the device cannot take."""
IP_RECVERR: Final = 11
IP_FREEBIND: Final = 15

# linux/icmp.h
ICMP_FILTER: Final = 1
"""Of SOL_RAW: a bit for each ICMP type the socket shall not get."""

# linux/errqueue.h
SO_EE_ORIGIN_LOCAL: Final = 1

# asm-generic/socket.h
SO_SNDBUFFORCE: Final = 32
"""2.6.14"""
SO_RCVBUFFORCE: Final = 33
"""2.6.14"""
SO_MEMINFO: Final = 55
"""4.12"""
SO_ATTACH_FILTER: Final = 26
SO_TIMESTAMPNS: Final = 35
"""2.6.22"""
SO_RXQ_OVFL: Final = 40
"""2.6.33"""
SO_MAX_PACING_RATE: Final = 47
"""3.13; of TCP without a queueing discipline that paces 4.13"""
SO_TIMESTAMPING_NEW: Final = 65
"""5.1; also the type of its control message, struct scm_timestamping64: three times of two 64-bit
numbers, seconds and nanoseconds, of which software's is the first."""

# linux/net_tstamp.h
SOF_TIMESTAMPING_RX_SOFTWARE: Final = 1 << 3
SOF_TIMESTAMPING_SOFTWARE: Final = 1 << 4

# linux/sock_diag.h
SK_MEMINFO_RMEM_ALLOC: Final = 0
"""4.12: indexes in the array of u32 that SO_MEMINFO gets. What its receive queue is charged."""
SK_MEMINFO_DROPS: Final = 8
"""Datagrams it dropped."""

# linux/socket.h: levels of setsockopt
SOL_RAW: Final = 255
SOL_PACKET: Final = 263
SOL_NETLINK: Final = 270

# linux/sched.h
CLONE_NEWNET: Final = 0x40000000
"""2.6.24"""

# linux/capability.h
CAP_NET_ADMIN: Final = 12
"""Devices, addresses, routes, forced socket buffers."""
CAP_NET_RAW: Final = 13
"""Raw and packet sockets; iptables-legacy's own sockets are raw ones."""
LINUX_CAPABILITY_VERSION_3: Final = 0x20080522
"""2.6.26: sets of 64 bits."""

# linux/prctl.h
PR_SET_PDEATHSIG: Final = 1
PR_SET_NAME: Final = 15
"""2.6.9"""
PR_CAPBSET_READ: Final = 23
"""2.6.25"""
PR_CAPBSET_DROP: Final = 24
"""2.6.25"""
PR_SET_CHILD_SUBREAPER: Final = 36
"""3.4"""
PR_SET_NO_NEW_PRIVS: Final = 38
"""3.5"""

# linux/netlink.h
NETLINK_ROUTE: Final = 0
NETLINK_XFRM: Final = 6
NETLINK_NETFILTER: Final = 12
NETLINK_NO_ENOBUFS: Final = 5
"""2.6.30: a full receive buffer is no error of the socket."""
NETLINK_CAP_ACK: Final = 10
"""4.3: acknowledgements without the payload of the request."""
NETLINK_EXT_ACK: Final = 11
"""4.12: acknowledgements with the kernel's reason in words."""
NETLINK_GET_STRICT_CHK: Final = 12
"""4.20: the kernel filters dumps by the fields of the request."""
NLM_F_REQUEST: Final = 0x001
NLM_F_ACK: Final = 0x004
NLM_F_DUMP_INTR: Final = 0x010
"""3.2: what is dumped changed meanwhile."""
NLM_F_DUMP: Final = 0x300
NLM_F_REPLACE: Final = 0x100
NLM_F_EXCL: Final = 0x200
NLM_F_CREATE: Final = 0x400
NLM_F_CAPPED: Final = 0x100
"""4.12"""
NLM_F_ACK_TLVS: Final = 0x200
"""4.12"""
NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3
NLMSGERR_ATTR_MSG: Final = 1
"""4.12"""

# linux/rtnetlink.h
RTM_NEWLINK: Final = 16
RTM_DELLINK: Final = 17
RTM_GETLINK: Final = 18
RTM_NEWADDR: Final = 20
RTM_DELADDR: Final = 21
RTM_GETADDR: Final = 22
RTM_NEWROUTE: Final = 24
RTM_DELROUTE: Final = 25
RTM_GETROUTE: Final = 26
RTM_NEWRULE: Final = 32
RTM_DELRULE: Final = 33
RTM_GETNEIGH: Final = 30
RTM_GETRULE: Final = 34
RTM_GETQDISC: Final = 38
RTM_GETTFILTER: Final = 46
TCA_KIND: Final = 1
TCA_STATS2: Final = 7
RTMGRP_LINK: Final = 0x1
RTMGRP_IPV4_IFADDR: Final = 0x10
RTMGRP_IPV4_ROUTE: Final = 0x40
RTMGRP_IPV4_RULE: Final = 0x80
RTEXT_FILTER_SKIP_STATS: Final = 0x8
"""4.4: links without their counters."""
RTM_F_LOOKUP_TABLE: Final = 0x1000
"""4.4: the table a lookup found its route in, rather than main's number."""
RTM_F_FIB_MATCH: Final = 0x2000
"""4.13: the route a lookup found rather than its result."""
RTA_DST: Final = 1
RTA_SRC: Final = 2
RTA_IIF: Final = 3
RTA_OIF: Final = 4
RTA_GATEWAY: Final = 5
RTA_PRIORITY: Final = 6
RTA_PREFSRC: Final = 7
RTA_METRICS: Final = 8
RTA_MULTIPATH: Final = 9
RTA_CACHEINFO: Final = 12
RTA_TABLE: Final = 15
"""2.6.19"""
RTA_MARK: Final = 16
"""2.6.33"""
RTAX_MTU: Final = 2
RTA_IP_PROTO: Final = 27
"""4.19, as the next two"""
RTA_SPORT: Final = 28
RTA_DPORT: Final = 29
RTNH_F_ONLINK: Final = 4
RTN_UNICAST: Final = 1
RTN_LOCAL: Final = 2
RTN_BROADCAST: Final = 3
RTN_ANYCAST: Final = 4
RTN_MULTICAST: Final = 5
RTN_BLACKHOLE: Final = 6
RTN_UNREACHABLE: Final = 7
RTN_PROHIBIT: Final = 8
RTN_THROW: Final = 9
RT_SCOPE_UNIVERSE: Final = 0
RT_SCOPE_LINK: Final = 253
RT_SCOPE_HOST: Final = 254
RT_SCOPE_NOWHERE: Final = 255
RT_TABLE_UNSPEC: Final = 0
RT_TABLE_DEFAULT: Final = 253
RT_TABLE_MAIN: Final = 254
RT_TABLE_LOCAL: Final = 255
RTPROT_BOOT: Final = 3

# linux/fib_rules.h
FRA_PRIORITY: Final = 6
FRA_FWMARK: Final = 10
FRA_SUPPRESS_PREFIXLEN: Final = 14
"""3.12"""
FRA_TABLE: Final = 15
FRA_FWMASK: Final = 16
FRA_PROTOCOL: Final = 21
"""4.17"""
FR_ACT_TO_TBL: Final = 1
FIB_RULE_INVERT: Final = 0x2

# linux/pkt_sched.h
TC_H_ROOT: Final = 0xFFFFFFFF
TC_H_CLSACT: Final = 0xFFFFFFF1
"""4.5"""
TC_H_MIN_INGRESS: Final = 0xFFF2
TC_H_MIN_EGRESS: Final = 0xFFF3

# linux/gen_stats.h
TCA_STATS_BASIC: Final = 1
TCA_STATS_QUEUE: Final = 3

# linux/xfrm.h
XFRM_MSG_GETPOLICY: Final = 0x15
XFRM_MSG_GETDEFAULT: Final = 0x28
"""5.15, as the next one"""
XFRM_USERPOLICY_BLOCK: Final = 1
XFRM_POLICY_BLOCK: Final = 1
XFRMA_TMPL: Final = 5
XFRMA_MARK: Final = 21
XFRMA_IF_ID: Final = 31
"""4.19"""

# linux/if_link.h
IFLA_IFNAME: Final = 3
IFLA_MTU: Final = 4
IFLA_LINK: Final = 5
IFLA_MASTER: Final = 10
IFLA_TXQLEN: Final = 13
IFLA_LINKINFO: Final = 18
IFLA_EXT_MASK: Final = 29
IFLA_LINK_NETNSID: Final = 37
"""4.0"""
IFLA_INFO_KIND: Final = 1
IFLA_INFO_SLAVE_KIND: Final = 4
"""3.14"""
IFLA_XDP: Final = 43
"""4.8"""
IFLA_XDP_ATTACHED: Final = 2
IFLA_XDP_DRV_PROG_ID: Final = 5
"""4.16, as the next two"""
IFLA_XDP_SKB_PROG_ID: Final = 6
IFLA_XDP_HW_PROG_ID: Final = 7
XDP_ATTACHED_DRV: Final = 1
XDP_ATTACHED_SKB: Final = 2
XDP_ATTACHED_HW: Final = 3

# linux/if_addr.h
IFA_ADDRESS: Final = 1
IFA_LOCAL: Final = 2
IFA_BROADCAST: Final = 4
IFA_FLAGS: Final = 8
"""3.14: all 32 bits of the flags."""
IFA_F_TEMPORARY: Final = 0x01
IFA_F_DEPRECATED: Final = 0x20
IFA_F_PERMANENT: Final = 0x80

# linux/netfilter/nfnetlink.h
NFNLGRP_NFTABLES: Final = 7
"""3.14: changes of tables, chains, rules and sets."""

# linux/bpf.h
BPF_MAP_CREATE: Final = 0
BPF_PROG_LOAD: Final = 5
BPF_PROG_QUERY: Final = 16
"""4.15"""
BPF_RAW_TRACEPOINT_OPEN: Final = 17
"""4.17"""
BPF_MAP_TYPE_ARRAY: Final = 2
BPF_MAP_TYPE_RINGBUF: Final = 27
"""5.8"""
BPF_F_MMAPABLE: Final = 0x400
"""5.5"""
BPF_PROG_TYPE_RAW_TRACEPOINT: Final = 17
"""4.17"""
BPF_PSEUDO_MAP_FD: Final = 1
BPF_FUNC_map_lookup_elem: Final = 1
BPF_FUNC_ktime_get_ns: Final = 5
BPF_FUNC_probe_read_kernel: Final = 113
"""5.5"""
BPF_FUNC_ringbuf_reserve: Final = 131
"""5.8, as those up to BPF_RINGBUF_DISCARD_BIT"""
BPF_FUNC_ringbuf_submit: Final = 132
BPF_RB_NO_WAKEUP: Final = 1
BPF_RINGBUF_BUSY_BIT: Final = 0x80000000
BPF_RINGBUF_DISCARD_BIT: Final = 0x40000000
BPF_F_QUERY_EFFECTIVE: Final = 1
BPF_CGROUP_INET_INGRESS: Final = 0
"""4.10, as the next one"""
BPF_CGROUP_INET_EGRESS: Final = 1
BPF_CGROUP_UDP4_SENDMSG: Final = 14
"""4.18"""
BPF_CGROUP_UDP4_RECVMSG: Final = 19
"""5.2"""
BPF_SK_LOOKUP: Final = 36
"""5.9"""
BPF_TCX_INGRESS: Final = 46
"""6.6, as the next one"""
BPF_TCX_EGRESS: Final = 47

# linux/neighbour.h
NDA_DST: Final = 1
NDA_LLADDR: Final = 2
NUD_INCOMPLETE: Final = 0x01
NUD_REACHABLE: Final = 0x02
NUD_STALE: Final = 0x04
NUD_DELAY: Final = 0x08
NUD_PROBE: Final = 0x10
NUD_FAILED: Final = 0x20
NUD_NOARP: Final = 0x40
NUD_PERMANENT: Final = 0x80
