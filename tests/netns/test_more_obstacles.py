"""Obstacles before, beside and below the rules of netfilter's IPv4 hooks.

As in test_obstacles.py: each is planted on node 2, a ping from pod 1 to pod 2 shows that it is
one, the finding names it, and the command of the finding lets the ping pass.
"""

from __future__ import annotations

from tests.netns.test_obstacles import Obstacle, check_each
from tests.nodes import MakeOverlay
from tundp.finding import Verdict

TABLE = "ip route add default via 192.0.2.254 table 100;"
UNTABLE = "ip rule del priority 1 || true; ip rule del priority 100; ip route flush table 100"
OBSTACLES = {
    "no tracking before a firewall that accepts by state": Obstacle(
        "iptables -t raw -A PREROUTING -p udp --dport 8285 -j NOTRACK;"
        "iptables -A INPUT -m conntrack --ctstate NEW,RELATED,ESTABLISHED -j ACCEPT;"
        "iptables -A INPUT -p udp -j DROP",
        "iptables -t raw -F; iptables -F INPUT",
        ("-A INPUT -p udp -j DROP", "of the tunnel (UDP) from peers"),
    ),
    "no tracking and a drop of what is not tracked, nft": Obstacle(
        "nft 'table ip odd { chain p { type filter hook prerouting priority -300;"
        ' iifname "flannel0" notrack; }; chain f { type filter hook forward priority 0;'
        " ct state untracked drop; }; }'",
        "nft delete table ip odd",
        ("ct state untracked drop", "from peers to pods"),
    ),
    "a mark and a policy rule for it": Obstacle(
        f"{TABLE} ip rule add fwmark 0x10 table 100 priority 100;"
        "iptables -t mangle -A PREROUTING -s 10.5.0.0/16 -j MARK --set-mark 0x10",
        f"iptables -t mangle -F; {UNTABLE}",
        ("mark 0x10", "table 100 (ip rule)"),
        "obstacle.route",
    ),
    "a mark on the tunnel's datagrams": Obstacle(
        "ip route add blackhole default table 100; ip rule add fwmark 0x20/0xf0 table 100"
        " priority 100; nft 'table ip vpn { chain o { type route hook output priority -150;"
        " ip daddr 192.0.2.1 udp dport 8285 meta mark set meta mark | 0x20; }; }'",
        f"nft delete table ip vpn; {UNTABLE}",
        ("mark 0x20", "datagrams to 192.0.2.1"),
        "obstacle.tunnel",
    ),
    "netdev ingress of the uplink": Obstacle(
        "nft 'table netdev guard { chain c { type filter hook ingress device eth0 priority 0;"
        " udp dport 8285 drop; }; }'",
        "nft delete table netdev guard",
        ("nft table netdev guard, chain c", "udp dport 8285 drop"),
    ),
    "inet ingress of the TUN": Obstacle(
        "nft 'table inet guard { chain c { type filter hook ingress device flannel0 priority 0;"
        " policy drop; ip saddr 203.0.113.0/24 accept; }; }'",
        "nft delete table inet guard",
        ("nft table inet guard, policy drop of chain c",),
    ),
    "netdev egress of the uplink": Obstacle(
        "nft 'table netdev guard { chain c { type filter hook egress device eth0 priority 0;"
        " ip daddr 192.0.2.0/24 udp dport 8000-9000 drop; }; }'",
        "nft delete table netdev guard",
        ("nft table netdev guard, chain c", "8000-9000 drop"),
    ),
    "a program of tc": Obstacle(
        "tc qdisc add dev eth0 clsact;"
        "tc filter add dev eth0 ingress prio 7 protocol ip bpf bytecode '1,6 0 0 2,' da",
        "tc qdisc del dev eth0 clsact || true",
        ("eth0", "bpf"),
        "obstacle.tc",
    ),
    "a blocking IPsec policy": Obstacle(
        "ip xfrm policy add src 10.5.0.0/16 dst 10.5.0.0/16 dir fwd action block",
        "ip xfrm policy delete src 10.5.0.0/16 dst 10.5.0.0/16 dir fwd || true",
        ("IPsec policy", "fwd"),
        "obstacle.ipsec",
    ),
    "an IPsec policy without its association": Obstacle(
        "ip xfrm policy add src 0.0.0.0/0 dst 192.0.2.1/32 proto udp dir out"
        " tmpl proto comp mode transport",
        "ip xfrm policy delete src 0.0.0.0/0 dst 192.0.2.1/32 proto udp dir out || true",
        ("IPsec policy", "out", "takes into IPsec"),
        "obstacle.ipsec",
        Verdict.NOTE,
    ),
}


async def test_each_of_these_obstacles_too(make_overlay: MakeOverlay) -> None:
    await check_each(make_overlay, OBSTACLES)
