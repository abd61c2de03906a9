"""Kernel constants the standard library lacks, each with its header."""

from __future__ import annotations

from typing import Final

# linux/if_tun.h
IFF_TUN: Final = 0x0001
IFF_NO_PI: Final = 0x1000

# linux/in.h
IP_MTU_DISCOVER: Final = 10
IP_PMTUDISC_DO: Final = 2
IP_MTU: Final = 14

# asm-generic/socket.h
SO_RCVBUFFORCE: Final = 33
SO_SNDBUFFORCE: Final = 32
SO_RXQ_OVFL: Final = 40
