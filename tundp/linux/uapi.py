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
