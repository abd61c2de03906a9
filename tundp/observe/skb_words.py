"""What the kernel's drop reasons mean for packets of the overlay, and what to look at next.

Names and their meaning are those of include/net/dropreason-core.h.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Words(NamedTuple):
    """A reason in words."""

    means: str
    next_step: str = ""
    """May name {device}, {source}, {destination} of the packet as it was dropped, and {port}."""
    is_copy: bool = False
    """Whether only a copy was dropped, and the packet went on."""


_FRAGMENT: Final = "datagrams are fragmented on the way: tundp status, path MTU"
_NEIGHBOUR: Final = "ip neigh show dev {device}; is {destination}, or the gateway to it, up?"
_QUEUE: Final = "tc -s qdisc show dev {device}"
WORDS: Final = {
    "NETFILTER_DROP": Words(
        "a rule or a chain's policy of netfilter dropped it",
        "nft -a list ruleset; iptables-save -c, iptables-legacy-save -c: whose counter moves?",
    ),
    "IP_RPFILTER": Words(
        "reverse path filter: the route back to {source} does not leave by {device}",
        "ip route get {source}; sysctl -w net/ipv4/conf/{device}/rp_filter=2",
    ),
    "UDP_CSUM": Words(
        "wrong UDP checksum",
        "corruption on the path, or a sender's offload that never finished it: there, ethtool -K"
        " <uplink> tx off",
    ),
    "IP_CSUM": Words("wrong IPv4 header checksum", "corruption, or a sender's offload: its host"),
    "TCP_CSUM": Words("wrong TCP checksum", "corruption, or a sender's offload: its host"),
    "ICMP_CSUM": Words("wrong ICMP checksum", "corruption, or a sender's offload: its host"),
    "SKB_CSUM": Words("the checksum could not be finished", "ethtool -k {device}"),
    "SOCKET_RCVBUFF": Words(
        "the socket's receive buffer is full",
        "its program is too slow or stopped: ss -uamn; sysctl -w net.core.rmem_max=8388608",
    ),
    "PROTO_MEM": Words("no memory left for the protocol", "sysctl net.ipv4.udp_mem; free -m"),
    "SOCKET_BACKLOG": Words("the socket's backlog is full", "its program is too slow: ss -uamn"),
    "SOCKET_FILTER": Words("a filter of the socket dropped it (SO_ATTACH_BPF)", "ss -uamnb"),
    "NO_SOCKET": Words(
        "nobody listens on this address and port",
        "ss -uanp, ss -tlnp: is the program up, on this address? If the port is {port}:"
        " systemctl status tundp (or flanneld)",
    ),
    "SOCKET_CLOSE": Words("its socket is being closed"),
    "NEIGH_FAILED": Words("the next hop answers no ARP", _NEIGHBOUR),
    "NEIGH_CREATEFAIL": Words("no neighbour entry could be made", "ip -s neigh; dmesg"),
    "NEIGH_QUEUEFULL": Words(
        "too many packets wait for an answer to ARP (unres_qlen_bytes)", _NEIGHBOUR
    ),
    "NEIGH_DEAD": Words("its neighbour entry was just removed", _NEIGHBOUR),
    "NEIGH_HH_FILLFAIL": Words("no link header could be made", "ip -d link show dev {device}"),
    "IP_INHDR": Words("broken IPv4 header, or TTL exceeded", "ip route get {destination}; a loop?"),
    "IP_INADDRERRORS": Words(
        "this host neither has nor forwards to its destination",
        "ip route get {destination} from {source} iif {device}; sysctl net.ipv4.ip_forward",
    ),
    "IP_INNOROUTES": Words(
        "no route, or an unreachable one", "ip route get {destination} from {source} iif {device}"
    ),
    "IP_OUTNOROUTES": Words("no route to send it by", "ip route get {destination}"),
    "IP_LOCAL_SOURCE": Words(
        "martian: its source {source} is this host's own", "who else has it? ip addr; arping"
    ),
    "IP_INVALID_SOURCE": Words(
        "martian: its source {source} is no host's", "whoever sent it: tcpdump -eni {device}"
    ),
    "IP_LOCALNET": Words(
        "martian: a loopback address on {device}",
        "sysctl net/ipv4/conf/{device}/route_localnet, if that is wanted",
    ),
    "IP_INVALID_DEST": Words(
        "its destination {destination} is no host's", "whoever sent it: tcpdump -eni {device}"
    ),
    "IP_NOPROTO": Words("nobody here takes this protocol"),
    "PKT_TOO_BIG": Words(
        "larger than the MTU of the way out, with DF set, or not to be fragmented",
        "ip route get {destination}; ip link: compare MTUs. Usual once for each flow",
    ),
    "PKT_TOO_SMALL": Words("shorter than its header says", "something on the path cuts packets"),
    "HDR_TRUNC": Words("its header is cut off", "something on the path cuts packets"),
    "DUP_FRAG": Words("a fragment that came twice", _FRAGMENT),
    "FRAG_REASM_TIMEOUT": Words("other fragments of it never came", _FRAGMENT),
    "FRAG_TOO_FAR": Words("fragments came too far out of order", _FRAGMENT),
    "FULL_RING": Words(
        "the queue of {device} is full: its reader is too slow, or stopped",
        "top -H, tundp status; if {device} is a TUN, its daemon reads that queue",
    ),
    "DEV_READY": Words(
        "{device} was not ready to take it (down, or nobody holds it)", "ip link show dev {device}"
    ),
    "DEV_HDR": Words("{device} could not make its link header", "ip -d link show dev {device}"),
    "NOMEM": Words("no memory", "free -m; dmesg"),
    "CPU_BACKLOG": Words(
        "the CPU's input queue is full", "sysctl net.core.netdev_max_backlog; top: softirqs"
    ),
    "QDISC_DROP": Words("the queue of {device} dropped it (full, or made to)", _QUEUE),
    "QDISC_OVERLIMIT": Words("the queue of {device} is full", _QUEUE),
    "QDISC_CONGESTED": Words("the queue of {device} is congested", _QUEUE),
    "TC_INGRESS": Words("a filter of tc dropped it", "tc filter show dev {device} ingress"),
    "TC_EGRESS": Words("a filter of tc dropped it", "tc filter show dev {device} egress"),
    "XDP": Words("an XDP program dropped it", "ip -d link show dev {device}"),
    "BPF_CGROUP_EGRESS": Words(
        "a BPF program of the sender's control group dropped it",
        "bpftool cgroup tree; systemd: IPAddressDeny=",
    ),
    "XFRM_POLICY": Words("an IPsec policy refuses it", "ip xfrm policy; ip -s xfrm state"),
    "SECURITY_HOOK": Words("a security module (SELinux, AppArmor) refuses it", "ausearch -m avc"),
    "OTHERHOST": Words(
        "its link address is another host's",
        "a stale ARP entry at the sender, or a bridge that floods: tcpdump -eni {device}",
    ),
    "UNICAST_IN_L2_MULTICAST": Words("a packet for one host in a frame for many"),
    "UNHANDLED_PROTO": Words("no protocol of this host takes such frames"),
    "QUEUE_PURGE": Words("its queue was emptied, as when a device goes down", "ip link"),
    "RECURSION_LIMIT": Words(
        "it went through too many devices: a loop", "ip route get {destination}"
    ),
    "TAP_FILTER": Words("the filter of {device} dropped it (TUNSETTXFILTER)"),
    "TAP_TXFILTER": Words("the filter of {device} dropped it (TUNATTACHFILTER)"),
    "LOCAL_MAC": Words("its link source address is this host's own: a loop, or a clone"),
    "BRIDGE_INGRESS_STP_STATE": Words(
        "the bridge's port does not forward (spanning tree)", "bridge link show dev {device}"
    ),
    "NO_TX_TARGET": Words("the bridge or tunnel knows no way for it", "bridge fdb show"),
    "PACKET_SOCK_ERROR": Words(
        "a copy for a packet socket (tcpdump) that is full; the packet went on", is_copy=True
    ),
    "NOT_SPECIFIED": Words("the kernel gives no reason; the function tells where"),
}
_ECHO_REPLY: Final = Words(
    "an echo reply no ping socket waits for; raw sockets, and tundp itself, had it before",
    is_copy=True,
)
"""Every reply ends here but those of unprivileged ping (net/ipv4/ping.c)."""
_BY_FUNCTION: Final = {
    "ip_error": Words(
        "the route to it says unreachable, or forwarding is off",
        "ip route get {destination} from {source} iif {device}; sysctl net.ipv4.ip_forward",
    ),
}
"""Where the kernel gives no reason, and only one thing is done there (net/ipv4/route.c)."""
_TCP: Final = Words("TCP of this host did not take it: usual for repeated, late or stray segments")
_ELSE: Final = Words("see this name in include/net/dropreason-core.h of the kernel")


def words_of(reason: str, function: str | None = None) -> Words:
    """A reason's words; some of every name."""
    if (reason, function) == ("NO_SOCKET", "ping_rcv"):
        return _ECHO_REPLY
    if reason == "NOT_SPECIFIED" and function in _BY_FUNCTION:
        return _BY_FUNCTION[function]
    return WORDS.get(reason) or (_TCP if reason.startswith("TCP_") else _ELSE)
