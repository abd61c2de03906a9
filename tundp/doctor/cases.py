"""Every id `tundp doctor` can name: the cause, and what mends it. docs/debugging.md is made of it.

Why one room: it is a table. The command a finding gives names devices, chains and addresses of the
host at hand; here is its general form.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tundp.wire.drop import DropReason


@dataclass(frozen=True, slots=True)
class Case:
    """What can be found."""

    id: str
    check: str
    """The check that finds it."""
    cause: str
    mends: str
    """The general form of the command; in words where no single command does."""


_HERE: Final = (
    # The daemon
    Case("chaos", "chaos", "somebody impairs packets on purpose", "`tundp chaos stop`"),
    Case("daemon.dead", "daemon", "no daemon runs", "`systemctl start tundp`"),
    Case("daemon.stopped", "daemon", "the daemon's process is stopped", "`kill -CONT PID`"),
    Case("daemon.hung", "daemon", "the daemon does not answer", "`systemctl restart tundp`"),
    Case("daemon.socket", "daemon", "it runs with another admin socket", "`--admin-socket`"),
    Case("daemon.starting", "daemon", "a start waits for something", "what it waits for"),
    Case("daemon.version", "daemon", "the daemon is older than the command", "restart it"),
    Case("event-loop", "health", "the event loop is late: leases are not followed", "CPU time"),
    Case("packet-threads", "health", "a packet thread makes no iteration", "restart, report it"),
    Case("tasks", "health", "a task of the daemon fails again and again", "report the log's bug"),
    Case("leases-synced", "health", "leases come from the cache, not from the store", "the store"),
    Case("firewall", "health", "rules of ours are missing, or iptables does not run", "as named"),
    Case("firewall-contest", "health", "another program removes our rules", "stop that program"),
    Case("kernel-contest", "health", "another program undoes address, route or MTU", "stop it"),
    Case("device-contest", "health", "another program deletes the TUN", "stop that program"),
    Case("subnet-file", "health", "subnet.env cannot be written", "as named: disk, rights, unit"),
    Case("subnet-file-unseen", "health", "subnet.env cannot be read back", "as named"),
    Case("state-dir", "health", "leases cannot be kept on disk", "as named"),
    Case("systemd", "health", "systemd's socket does not take notifications", "as named"),
    Case("admin-socket", "health", "the admin socket is removed again and again", "who does it"),
    Case("metrics", "health", "the metrics cannot be served", "as named"),
    Case("path-mtu", "health", "paths are not measured", "start it with CAP_NET_RAW"),
    Case("store.certificates", "health", "a new certificate cannot be read", "as named"),
    # Device and lease
    Case("device.down", "device", "the TUN is down", "`ip link set dev TUN up`"),
    Case("device.gone", "device", "the TUN is deleted", "nothing: it is made again"),
    Case("device.address", "device", "the TUN lacks its address", "`ip addr add A/32 dev TUN`"),
    Case("device.route", "device", "no route to the TUN", "`ip route add NETWORK dev TUN`"),
    Case("device.mtu", "device", "the TUN has another MTU", "`ip link set dev TUN mtu N`"),
    Case("underlay", "device", "the daemon found no interface to use", "as named"),
    Case("underlay.gone", "device", "the uplink is gone", "bring it back, or --iface"),
    Case("underlay.down", "device", "the uplink is down", "`ip link set dev UPLINK up`"),
    Case("underlay.address", "device", "the uplink lost its address", "DHCP, netplan"),
    Case("public-ip", "device", "peers are told an address nobody here has", "without --public-ip"),
    Case("lease.conflict", "lease", "another node holds this subnet", "`etcdctl del KEY`"),
    Case("lease.lost", "lease", "the lease is not confirmed", "the store"),
    Case("lease.expired", "lease", "the lease expired and was not renewed", "the store"),
    Case("lease.duplicate", "lease", "another lease has our PublicIP", "`etcdctl del KEY`"),
    Case(
        "peers.refused", "lease", "a lease is no peer: other backend, no PublicIP, ...", "its node"
    ),
    Case("store.unreadable", "lease", "an entry of the store is no lease", "`etcdctl del KEY`"),
    # The store
    Case("store", "store", "network config or leases cannot be read", "as named"),
    Case("store.silent", "store", "the store takes requests and answers none", "there: restart it"),
    Case("store.network-config", "store", "the network config is wrong", "as named: the key"),
    Case("store.withheld", "store", "unreadable keys keep subnets from being given out", "delete"),
    Case("store.two-configs", "store", "etcd v2 and v3 have a network config each", "delete one"),
    Case("store.away", "endpoints", "the daemon gets no answer from the store", "the store"),
    Case("store.refused", "endpoints", "nothing listens at the endpoint", "`systemctl start etcd`"),
    Case("store.filtered", "endpoints", "the endpoint does not answer", "its host, its firewall"),
    Case("store.route", "endpoints", "no route to the endpoint", "`ip route del KIND HOST`"),
    Case("store.forbidden", "endpoints", "a local rule refuses the connection", "that rule"),
    Case("store.name", "endpoints", "the endpoint's name has no address", "resolver, /etc/hosts"),
    # What a start depends on
    Case("settings", "start", "a flag, variable or file is wrong", "as named"),
    Case("rights", "start", "no CAP_NET_ADMIN, or no /dev/net/tun", "root; the container's device"),
    Case("limits", "start", "a limit or seccomp filter takes what a daemon needs", "as named"),
    Case("sandbox", "start", "--sandbox cannot be held", "a newer kernel, or off"),
    Case("files", "start", "a folder cannot be written, or not by the unit", "ReadWritePaths="),
    Case("interface", "start", "no interface fits, or a wrong one was chosen", "`--iface`"),
    Case(
        "interface.warning", "start", "VirtualBox's NAT, link-local or overlay address", "`--iface`"
    ),
    Case("interface.mtu", "start", "the uplink's MTU carries no overlay", "another uplink"),
    Case("lease", "start", "the subnet of subnet.env cannot be had", "as named"),
    Case("peers", "start", "leases would be no peers", "`ip route get ADDRESS`"),
    Case(
        "queues",
        "start",
        "queues are shorter than tundp asks for: a restart loses packets sooner",
        "`ip link set dev TUN txqueuelen N`, `sysctl -w net.core.rmem_max=N`",
    ),
    Case("ports.taken", "start", "another program has our port", "stop it (flanneld?)"),
    Case("routes.overlap", "start", "a route overlaps the network", "`ip route del PREFIX`"),
    Case("br_netfilter", "start", "bridged packets pass no iptables", "`modprobe br_netfilter`"),
    Case("firewall.unit", "start", "legacy iptables without CAP_NET_RAW", "`systemctl edit tundp`"),
    Case("backend", "start", "the backend cannot work on this underlay", "as named"),
    # In the way of packets
    Case("obstacles", "obstacles", "a part of it could not be read", "as named: run it as root"),
    Case(
        "obstacle.firewall",
        "obstacles",
        "a rule or policy drops or diverts packets",
        "an accept before it",
    ),
    Case("obstacle.hooks", "obstacles", "rules at hooks of other devices", "see the rules"),
    Case(
        "obstacle.forwarding",
        "obstacles",
        "the kernel forwards nothing",
        "`sysctl -w net.ipv4.ip_forward=1`",
    ),
    Case(
        "obstacle.rp_filter",
        "obstacles",
        "strict reverse path filter on the TUN",
        "`sysctl -w net/ipv4/conf/TUN/rp_filter=2`",
    ),
    Case(
        "obstacle.route",
        "obstacles",
        "a route or policy rule takes packets elsewhere",
        "`ip route del ...`",
    ),
    Case(
        "obstacle.tunnel",
        "obstacles",
        "datagrams cannot leave, loop, or are not let in",
        "as named",
    ),
    Case(
        "obstacle.conntrack",
        "obstacles",
        "the connection table is full",
        "`sysctl -w net.netfilter.nf_conntrack_max=N`",
    ),
    Case("obstacle.tc", "obstacles", "a filter or queue of tc drops", "`tc filter del ...`"),
    Case(
        "obstacle.xdp", "obstacles", "an XDP program may drop", "`ip link set dev D xdpgeneric off`"
    ),
    Case("obstacle.bpf", "obstacles", "BPF programs of sockets or control groups", "`bpftool ...`"),
    Case("obstacle.ipsec", "obstacles", "an IPsec policy blocks packets", "`ip xfrm policy ...`"),
    Case(
        "obstacle.neighbour",
        "obstacles",
        "a link address was fixed by hand",
        "`ip neigh del A dev UPLINK`",
    ),
    Case("obstacle.vrf", "obstacles", "a device belongs to a VRF", "`ip link set dev D nomaster`"),
    # Peers
    Case("peer.loop", "lease", "a peer is routed into the overlay", "`ip route del PEER dev TUN`"),
    Case(
        "peer.rp-filter",
        "peers",
        "what a peer sends comes in by another device than the route back",
        "`sysctl -w net/ipv4/conf/D/rp_filter=2`",
    ),
    Case("peers.none", "peers", "no other node has a lease", "nothing, or: which etcd has it?"),
    Case("peer.route", "peers", "no way to a peer's PublicIP", "see obstacle.tunnel"),
    Case(
        "peer.neighbour",
        "peers",
        "a wrong link address was fixed for a peer",
        "`ip neigh del A dev UPLINK`",
    ),
    Case(
        "peer.arp",
        "peers",
        "a peer's PublicIP answers no ARP",
        "there: is it up, has it the address?",
    ),
    Case(
        "peer.refused",
        "peers",
        "nobody listens on a peer's port, or a rule rejects",
        "there: `tundp doctor`",
    ),
    Case(
        "peer.filtered",
        "peers",
        "a peer answers pings, not datagrams",
        "there: `tundp doctor`; the network's firewall",
    ),
    Case("peer.unreachable", "peers", "a peer answers nothing", "there: `tundp doctor`"),
    Case("peer.silent", "peers", "more peers do not answer", "`tundp status`"),
    Case(
        "mtu.blackhole",
        "peers",
        "large packets vanish on the way to a peer",
        "`ip route replace PEER dev UPLINK mtu N`",
    ),
    Case("mtu.path", "peers", "the path is narrower than the uplink, and pods are told", "nothing"),
    # Pods
    Case(
        "pods.subnet",
        "bridge",
        "the bridge has an address of another subnet",
        "`ip addr add NEW; ip addr del OLD`",
    ),
    Case("pods.address", "bridge", "the bridge lost its address", "`ip addr add A dev BRIDGE`"),
    Case("pods.bridge-down", "bridge", "the bridge is down", "`ip link set dev BRIDGE up`"),
    Case(
        "pods.mtu",
        "bridge",
        "the bridge's MTU exceeds the overlay's",
        "`ip link set dev BRIDGE mtu N`",
    ),
    Case("pods.route", "bridge", "a route takes packets away from pods", "`ip route del ...`"),
    Case("pods.none", "bridge", "there are no pods yet", "nothing"),
    Case(
        "subnet-env.missing", "subnet-env", "there is no subnet.env", "nothing: it is written again"
    ),
    Case(
        "subnet-env.drift", "subnet-env", "subnet.env names another subnet", "who else writes it?"
    ),
    Case("cni.order", "cni", "another CNI config comes first", "`mv FILE FILE.disabled`"),
    Case("cni", "cni", "no CNI config, or not flannel's", "the CNI plugins"),
    Case(
        "masquerade.missing",
        "masquerade",
        "nobody masquerades what leaves the overlay",
        "`iptables -t nat -A POSTROUTING ...`; `--ip-masq`",
    ),
    Case(
        "masquerade.overlay",
        "masquerade",
        "source NAT hides pods from pods of other nodes",
        "an accept before it",
    ),
    # Traffic
    Case(
        "source.source-mismatches",
        "drops",
        "senders that do not hold the inner source's lease",
        "NAT, masquerade",
    ),
    Case(
        "source.destination-mismatches",
        "drops",
        "inner destinations that are not ours",
        "the sender's old lease",
    ),
    Case(
        "kernel.tun-queue",
        "drops",
        "the TUN's queue overflows",
        "`ip link set dev TUN txqueuelen N`, a faster engine; CPU time, `--workers`",
    ),
    Case(
        "kernel.udp-checksum",
        "drops",
        "datagrams with a wrong checksum arrive",
        "at the sender: `ethtool -K UPLINK tx off`",
    ),
    Case("kernel.udp-errors", "drops", "other sockets have no room for datagrams", "`ss -uamn`"),
    Case(
        "kernel.receive-buffer",
        "drops",
        "the overlay's socket overflows",
        "a faster engine; CPU time, `--workers`",
    ),
    Case("counters", "drops", "packets are unaccounted for: a bug of tundp", "report it"),
    Case("engine.reference", "speed", "packets are moved by Python", "`--engine=auto`"),
    Case(
        "engine.offload", "speed", "an offload was refused and is disabled", "nothing: tried again"
    ),
    Case("kernel.engine", "kernel", "the C engines cannot be used here", "`tundp probe`"),
)


def _drops() -> Iterator[Case]:
    for reason in DropReason:
        yield Case(f"drop.{reason.label}", "drops", reason.means, reason.next_step)


CASES: Final = (*_HERE, *_drops())
"""Every id but those of what is fine, and `not-looked.CHECK` of a check that could not look."""


def check_of(wanted: str) -> set[str]:
    """The checks that find an id, or ids that begin with it."""
    return {each.check for each in CASES if each.id == wanted or each.id.startswith(f"{wanted}.")}


def is_known(finding_id: str) -> bool:
    """Whether an id is in the table, itself or as one that another one stands for."""
    return any(
        finding_id == each.id or finding_id.startswith(f"{each.id}.") for each in CASES
    ) or finding_id.startswith("not-looked.")
