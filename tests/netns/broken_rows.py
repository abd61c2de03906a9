"""The table of broken labs: faults, how each is planted, and what is to be said of it."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import tests.bpf
import tests.conntrack
import tests.storm


def _program(module: str | None) -> str:
    assert module is not None
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(Path(module)))}"


BPF = _program(tests.bpf.__file__)
CONNTRACK = _program(tests.conntrack.__file__)
STORM = _program(tests.storm.__file__)
WORSE = ("fail", "warn")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A fault, and what is to be said of it."""

    id: str
    plant: str
    """Shell, on `on`. $POD2, $SUBNET1, $TUN1 and the like name what the lab has."""
    on: str = "node2"
    at: int = 2
    """The node whose doctor names it, and where its command is run."""
    words: tuple[str, ...] = ()
    """All of them in the evidence."""
    verdicts: tuple[str, ...] = WORSE
    traffic: str = "pods"
    """What it breaks: see `Broken.passes`; `""` if it breaks nothing by itself."""
    after: str = ""
    """What its command lets pass, if that is not what was seen to break."""
    there: str = ""
    """The id that the doctor of node 1, where pings fail, names meanwhile."""
    command: bool = True
    """Whether a command is printed; else `undo` mends it, and `next_step` says what to do."""
    is_for_machine: bool = False
    """Whether its command is for the machine the lab is on: `on the host`."""
    machine_undo: str = ""
    """What is left of that command, on the machine."""
    undo: str = ""
    """What is left of the fault after its command; on `on`."""
    given: bool = False
    """Whether doctor is told the daemon's settings, since no daemon can tell them."""
    storm: str = ""
    """Shell that sends packets while doctor looks: in pod 1 unless `storm_on` names another."""
    storm_on: str = "pod1"
    storm_stays: bool = False
    """Whether it goes on until all is mended: what mends the fault is to stand it."""
    mended_by: str = ""
    """The id whose command mends it, where the row's own has none."""
    is_blind_after: bool = False
    """Whether doctor cannot look, once its command has run, since the daemon is still stopped."""
    quick: bool = False
    """Whether it is in `make test`: one of each kind of check, and of those the shortest."""


PINGS = "exec timeout 40 ping -q -i0.05 $POD2"


ROWS = {
    "an nft rule that drops what is forwarded": Row(
        id="obstacle.firewall",
        plant="nft 'table inet other { chain c { type filter hook forward priority -10; iifname"
        ' "flannel*" drop; }; }\'',
        words=("nft table inet other", "drop"),
        undo="nft delete table inet other",
        quick=True,
    ),
    "iptables' policy for what is forwarded": Row(
        id="obstacle.firewall",
        plant="iptables -P FORWARD DROP",
        words=("policy drop of chain FORWARD",),
        undo="iptables -P FORWARD ACCEPT; iptables -F FORWARD",
    ),
    "Docker's rule in the raw table": Row(
        id="obstacle.firewall",
        plant="iptables -t raw -A PREROUTING -d $POD2 ! -i cni0 -j DROP",
        words=("table raw", "-j DROP"),
        undo="iptables -t raw -F",
    ),
    "the port filtered at the peer": Row(
        id="obstacle.firewall",
        plant="iptables -A INPUT -p udp --dport 8285 -j DROP",
        words=("of the tunnel (UDP) from peers",),
        there="peer.filtered",
        undo="iptables -F INPUT",
    ),
    "the port refused at the peer": Row(
        id="obstacle.firewall",
        plant="iptables -A INPUT -p udp --dport 8285 -j REJECT",
        words=("-j REJECT",),
        there="peer.refused",
        undo="iptables -F INPUT",
    ),
    "the port filtered on the way": Row(
        id="peer.filtered",
        plant="nft 'table bridge guard { chain c { type filter hook forward priority 0; udp dport"
        " 8285 drop; }; }'",
        on="switch",
        at=1,
        words=("192.0.2.2", "answers pings"),
        undo="nft delete table bridge guard",
        command=False,
    ),
    "no masquerading": Row(
        id="masquerade.missing",
        plant="iptables -t nat -F POSTROUTING",
        verdicts=("note",),
        words=("no rule here masquerades",),
        traffic="outside",
    ),
    "forwarding off": Row(
        id="obstacle.forwarding",
        plant="sysctl -q -w net.ipv4.ip_forward=0",
        words=("net.ipv4.ip_forward is 0",),
        quick=True,
    ),
    "strict reverse path filter": Row(
        id="obstacle.rp_filter",
        plant="sysctl -q -w net.ipv4.conf.flannel0.rp_filter=1",
        verdicts=("note",),
        words=("rp_filter is 1 on flannel0",),
        traffic="node",
        undo="sysctl -q -w net.ipv4.conf.flannel0.rp_filter=0",
    ),
    "an asymmetric route, filtered": Row(
        id="peer.rp-filter",
        plant="ip neigh replace 192.0.2.1 lladdr $MAC1 nud permanent dev eth1; ip route add"
        " 192.0.2.1/32 dev eth1 src 192.0.2.2; sysctl -q -w net.ipv4.conf.eth0.rp_filter=1",
        words=("192.0.2.1", "come in by eth0", "rp_filter is 1"),
        there="peer.",
        undo="ip route del 192.0.2.1/32 dev eth1; ip neigh del 192.0.2.1 dev eth1;"
        " sysctl -q -w net.ipv4.conf.eth0.rp_filter=0",
    ),
    "a route that takes a peer's subnet": Row(
        id="obstacle.route",
        plant="ip route add $SUBNET1 via 192.0.2.254",
        words=("do not go through flannel0",),
        undo="ip route del $SUBNET1 via 192.0.2.254",
    ),
    "a policy rule that takes the overlay": Row(
        id="obstacle.route",
        plant="ip route add default via 192.0.2.254 table 100; ip rule add to 10.5.0.0/16 table 100"
        " priority 100",
        words=("table 100",),
        undo="ip rule del priority 1; ip rule del priority 100; ip route flush table 100",
    ),
    "a blackhole route": Row(
        id="obstacle.route",
        plant="ip route add blackhole $SUBNET1",
        words=("blackhole",),
        undo="ip route del blackhole $SUBNET1",
        quick=True,
    ),
    "datagrams that go round and round": Row(
        id="peer.loop",
        plant="ip route add 192.0.2.1 dev flannel0",
        words=("192.0.2.1",),
        undo="ip route del 192.0.2.1 dev flannel0",
        quick=True,
    ),
    "a fixed link address that is wrong": Row(
        id="peer.neighbour",
        plant="ip neigh replace 192.0.2.1 lladdr 02:00:00:00:00:99 nud permanent dev eth0",
        words=("02:00:00:00:00:99",),
        there="peer.",
        undo="ip neigh del 192.0.2.1 dev eth0",
        quick=True,
    ),
    "a path that swallows large packets": Row(
        id="mtu.blackhole",
        plant="nft 'table bridge guard { chain c { type filter hook forward priority 0; ip daddr"
        " 192.0.2.2 ip length > 1300 drop; ip daddr 192.0.2.2 ip frag-off & 0x3fff != 0 drop;"
        " }; }'",
        on="switch",
        at=1,
        words=("bytes do not arrive at",),
        # The daemon measures a path a few seconds after large packets went there: none do here.
        traffic="",
        after="large",
        undo="nft delete table bridge guard; ip netns exec $NODE1 ip route del 192.0.2.2 dev eth0",
    ),
    "a peer's daemon is dead": Row(
        id="daemon.dead",
        plant="kill -9 $PID2",
        there="peer.refused",
        given=True,
        storm=PINGS,
    ),
    "a daemon that is stopped by a signal": Row(
        id="daemon.stopped",
        plant="kill -STOP $PID2",
        there="peer.filtered",
        undo="kill -CONT $PID2",
    ),
    "a lease stolen by another node": Row(
        id="lease.conflict",
        plant="$PUT/$KEY2 '" + '{"PublicIP":"192.0.2.77","TundpNode":"ffffffffffffffff"}' + "'",
        on="switch",
        words=("192.0.2.77",),
        undo="$DEL/$KEY2",
    ),
    "another lease with this node's PublicIP": Row(
        id="lease.duplicate",
        plant="$PUT/10.5.251.0-24 '"
        + '{"PublicIP":"192.0.2.2","TundpNode":"eeeeeeeeeeeeeeee"}'
        + "'",
        on="switch",
        traffic="",
        words=("10.5.251.0-24", "192.0.2.2"),
        undo="$DEL/10.5.251.0-24",
        quick=True,
    ),
    "the TUN is down, and nobody sets it up": Row(
        id="device.down",
        plant="kill -STOP $PID2; ip link set flannel0 down",
        words=("flannel0 is down",),
        after="nothing",
        is_blind_after=True,
        undo="kill -CONT $PID2",
    ),
    "the uplink is down": Row(
        id="underlay.down",
        plant="ip link set eth0 down",
        words=("eth0 is down",),
        there="peer.",
        undo="ip link set eth0 up",
    ),
    "the bridge lost its address": Row(
        id="pods.address",
        plant="ip addr flush dev cni0",
        words=("cni0",),
        quick=True,
    ),
    "the bridge has the subnet of another lease": Row(
        id="pods.subnet",
        plant="ip addr flush dev cni0; ip addr add 10.5.250.1/24 dev cni0",
        words=("10.5.250.1/24",),
    ),
    "the bridge is down": Row(
        id="pods.bridge-down",
        plant="ip link set cni0 down",
        words=("cni0",),
    ),
    "the bridge's MTU is larger than the overlay's": Row(
        id="pods.mtu",
        plant="ip link set veth1 mtu 1500; ip link set cni0 mtu 1500",
        traffic="",
        words=("cni0 has MTU 1500",),
        undo="ip link set veth1 mtu 1472",
    ),
    "another CNI config comes first": Row(
        id="cni.order",
        plant='echo \'{"type":"bridge"}\' > $CNI/05-other.conf',
        traffic="",
        words=("05-other.conf", "bridge"),
        undo="rm $CNI/05-other.conf.disabled",
        quick=True,
    ),
    "no way to the store": Row(
        id="store.route",
        plant="ip route add blackhole 192.0.2.254/32",
        traffic="",
        words=("192.0.2.254", "no route"),
        undo="ip route del blackhole 192.0.2.254/32",
        quick=True,
    ),
    "an XDP program that drops": Row(
        id="obstacle.xdp",
        plant=f"{BPF} xdp eth0 skb",
        verdicts=("note",),
        words=("XDP", "eth0"),
        undo="ip link set dev eth0 xdpgeneric off",
        there="peer.",
    ),
    "a queue that drops all": Row(
        id="obstacle.tc",
        plant="tc qdisc replace dev flannel0 root pfifo limit 0",
        words=("flannel0", "pfifo"),
        undo="tc qdisc del dev flannel0 root",
        quick=True,
    ),
    "datagrams rewritten by NAT, refused by the source check": Row(
        id="drop.source_port_mismatch",
        plant="nft 'table ip mangler { chain o { type filter hook postrouting priority 0; udp sport"
        " 8285 udp dport 8285 udp sport set 9999; }; }'",
        on="node1",
        words=("not from the overlay's",),
        storm=PINGS,
        undo="nft delete table ip mangler",
        storm_stays=True,
    ),
    "checksums that nobody finishes": Row(
        id="kernel.udp-checksum",
        plant="$ETHTOOL eth0 0; nft 'table ip mangler { chain o { type filter hook postrouting"
        " priority 0; udp dport 8285 udp checksum set 0x1234; }; }'",
        on="node1",
        words=("wrong checksum",),
        storm=PINGS,
        undo="nft delete table ip mangler; $ETHTOOL eth0 1",
        command=False,
    ),
    "an OUTPUT rule that refuses datagrams": Row(
        id="obstacle.firewall",
        plant="iptables -A OUTPUT -p udp --dport 8285 -j DROP",
        words=("of the tunnel (UDP) to peers",),
        undo="iptables -F OUTPUT",
    ),
    "one rule among 20,000": Row(
        id="obstacle.firewall",
        plant="{ echo '*filter'; for a in $(seq 100); do for b in $(seq 200); do echo"
        ' "-A INPUT -s 198.18.$a.$b/32 -j DROP"; done; done;'
        ' echo "-A INPUT -p udp --dport 8285 -j DROP"; echo COMMIT; } | iptables-restore -n',
        words=("rule 20001 of INPUT",),
        undo="iptables -F INPUT",
    ),
    "the connection table is full": Row(
        id="obstacle.conntrack",
        plant='test -n "$TRACKED" || { echo "the limit is not ours to set" >&2; exit 77; };'
        f" {CONNTRACK} fill",
        words=("the connection table holds", "new connections are dropped"),
        is_for_machine=True,
        undo=f"{CONNTRACK} flush",
        machine_undo="sysctl -q -w net.netfilter.nf_conntrack_max=$TRACKED",
    ),
    "masquerading that hides pods from pods": Row(
        id="masquerade.overlay",
        plant="iptables -t nat -I POSTROUTING -s $SUBNET2 ! -o cni0 -j MASQUERADE",
        words=("-j MASQUERADE", "from pods here to peers", "another source address"),
        traffic="source",
        undo="iptables -t nat -D POSTROUTING -s $SUBNET2 ! -o cni0 -j MASQUERADE;"
        " iptables -t nat -D POSTROUTING -s 10.5.0.0/16 -d 10.5.0.0/16 -j ACCEPT",
        quick=True,
    ),
    "a route that sends a pod's packets back into the overlay": Row(
        id="pods.route",
        plant="ip route add $POD2/32 dev flannel0",
        words=("flannel0", "/32"),
        undo="ip route del $POD2/32 dev flannel0",
    ),
    "the TUN's queue is too short": Row(
        id="kernel.tun-queue",
        plant="ip link set dev flannel0 txqueuelen 2",
        words=("its queue of 2 packets was full",),
        traffic="",
        storm=f"exec {STORM} bursts $POD1",
        storm_on="pod2",
        undo="ip link set dev flannel0 txqueuelen 1000",
        storm_stays=True,
    ),
    "the receive buffer is full": Row(
        id="kernel.receive-buffer",
        plant="@restart(--engine=reference)",
        words=("of port 8285 lost", "buffers were full"),
        traffic="",
        storm=f"exec {STORM} flood $POD2",
        undo="@restart(--engine=auto)",
    ),
    "packets are moved by Python": Row(
        id="engine.reference",
        plant="@restart(--engine=reference)",
        words=("moved by Python",),
        traffic="",
        undo="@restart(--engine=auto)",
    ),
    "a lease deleted while its daemon was stopped": Row(
        id="daemon.stopped",
        plant="kill -STOP $PID2; $DEL/$KEY2",
        there="drop.no_route",
        storm=PINGS,
        undo="kill -CONT $PID2",
    ),
    "a lease that expired while its node had no way to the store": Row(
        id="lease.expired",
        plant="@restart(--lease-ttl=4); until tundp status --brief --admin-socket=$SOCKET2"
        " >/dev/null 2>&1; do sleep 0.2; done; ip route add blackhole 192.0.2.254/32",
        words=("expired",),
        command=False,
        mended_by="store.route",
        undo="ip route del blackhole 192.0.2.254/32; @restart(--lease-ttl=86400)",
    ),
    "etcd is dead": Row(
        id="store.refused",
        plant="kill -9 $ETCDPID",
        on="switch",
        traffic="",
        words=("192.0.2.254", "nothing listens"),
        command=False,
        undo="$ETCD </dev/null >/dev/null 2>&1",
    ),
    "etcd hangs": Row(
        id="store.silent",
        plant="kill -STOP $ETCDPID",
        on="switch",
        traffic="",
        words=("did not answer",),
        command=False,
        undo="kill -CONT $ETCDPID",
    ),
    "etcd behind a firewall": Row(
        id="store.filtered",
        plant="nft 'table bridge guard { chain c { type filter hook input priority 0; tcp dport"
        " 2379 drop; }; }'",
        on="switch",
        traffic="",
        words=("192.0.2.254", "does not answer a connection"),
        command=False,
        undo="nft delete table bridge guard",
    ),
    "a network config that is none": Row(
        id="store.network-config",
        plant='$CONFIG \'{"Network":"10.5.0.0/33"}\'',
        on="switch",
        traffic="",
        words=("10.5.0.0/33",),
        command=False,
        undo='$CONFIG \'{"Network":"10.5.0.0/16"}\'',
    ),
    "an entry of the store that is no lease": Row(
        id="store.unreadable",
        plant="$PUT/10.5.253.0-24 nonsense",
        on="switch",
        traffic="",
        words=("10.5.253.0-24",),
        undo="$DEL/10.5.253.0-24",
    ),
    "a lease of another backend": Row(
        id="peers.refused",
        plant="$PUT/10.5.252.0-24 '"
        + '{"PublicIP":"192.0.2.88","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":'
        + '"02:00:00:00:00:88"}}'
        + "'",
        on="switch",
        traffic="",
        words=("10.5.252.0-24", "192.0.2.88"),
        command=False,
        undo="$DEL/10.5.252.0-24",
    ),
    "the uplink lost its address": Row(
        id="underlay.address",
        plant="ip addr del 192.0.2.2/24 dev eth0",
        words=("192.0.2.2",),
        there="peer.",
        command=False,
        undo="ip addr add 192.0.2.2/24 dev eth0",
    ),
    "a stranger's packets in the overlay": Row(
        id="source.source-mismatches",
        plant="true",
        at=1,
        verdicts=("note",),
        words=("datagrams were let in",),
        traffic="",
        storm=f"exec {STORM} forged 192.0.2.1 $POD2 $POD1",
        storm_on="switch",
        command=False,
        undo="true",
    ),
    "a PublicIP that nobody has": Row(
        id="public-ip",
        plant="@restart(--public-ip=192.0.2.77)",
        words=("192.0.2.77", "--public-ip"),
        there="peer.arp",
    ),
}
