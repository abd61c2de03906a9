"""Broken labs: each fault is planted, `tundp doctor` names it, and its command, verbatim, mends it.

pod1 -- cni0 [node1] eth0 -- [switch br0, etcd] -- eth0 [node2] cni0 -- pod2

One lab for all rows, with real daemons; each row leaves it as it was. `doctor` runs as a process of
its own in the namespace of a node, as an operator would run it.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

import tests.bpf
from tests.json_schema import validate
from tests.nodes import HEALTH_PORT, MakeLab, must_run
from tests.wait import until
from tundp.doctor import diagnosis
from tundp.doctor.cases import is_known
from tundp.lab.lab import Host, Lab, processes_in
from tundp.lab.overlay import PREFIX, STORE_ADDRESS, LabNode, OverlayLab, make_directory
from tundp.linux.command import SYSTEM_PATH

T = TypeVar("T")
VENV = Path(sys.executable).parent
TUNDP = str(VENV / "tundp")
PATH = f"{VENV}:{SYSTEM_PATH}"
BPF = f"{shlex.quote(sys.executable)} {shlex.quote(str(Path(tests.bpf.__file__)))}"
FLAGS = ("--engine=auto", "--iptables-forward-rules=false", f"--healthz-port={HEALTH_PORT}")
SOURCE_CHECKS = {1: "--source-check=count", 2: "--source-check=enforce"}
NAMED_S = 10.0
"""Within which a fault is to be named: a silence has to be one first."""
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
    undo: str = ""
    """What is left of the fault after its command; on `on`."""
    given: bool = False
    """Whether doctor is told the daemon's settings, since no daemon can tell them."""
    storm: bool = False
    """Whether pings are sent from pod 1 while doctor looks."""


ROWS = {
    "an nft rule that drops what is forwarded": Row(
        id="obstacle.firewall",
        plant="nft 'table inet other { chain c { type filter hook forward priority -10; iifname"
        ' "flannel*" drop; }; }\'',
        words=("nft table inet other", "drop"),
        undo="nft delete table inet other",
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
    ),
    "datagrams that go round and round": Row(
        id="peer.loop",
        plant="ip route add 192.0.2.1 dev flannel0",
        words=("192.0.2.1",),
        undo="ip route del 192.0.2.1 dev flannel0",
    ),
    "a fixed link address that is wrong": Row(
        id="peer.neighbour",
        plant="ip neigh replace 192.0.2.1 lladdr 02:00:00:00:00:99 nud permanent dev eth0",
        words=("02:00:00:00:00:99",),
        there="peer.",
        undo="ip neigh del 192.0.2.1 dev eth0",
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
    ),
    "the TUN is down, and nobody sets it up": Row(
        id="device.down",
        plant="kill -STOP $PID2; ip link set flannel0 down",
        words=("flannel0 is down",),
        after="nothing",
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
    ),
    "no way to the store": Row(
        id="store.route",
        plant="ip route add blackhole 192.0.2.254/32",
        traffic="",
        words=("192.0.2.254", "no route"),
        undo="ip route del blackhole 192.0.2.254/32",
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
    ),
    "datagrams rewritten by NAT, refused by the source check": Row(
        id="drop.source_port_mismatch",
        plant="nft 'table ip mangler { chain o { type filter hook postrouting priority 0; udp sport"
        " 8285 udp dport 8285 udp sport set 9999; }; }'",
        on="node1",
        words=("not from the overlay's",),
        storm=True,
        undo="nft delete table ip mangler",
    ),
    "checksums that nobody finishes": Row(
        id="kernel.udp-checksum",
        plant="$ETHTOOL eth0 0; nft 'table ip mangler { chain o { type filter hook postrouting"
        " priority 0; udp dport 8285 udp checksum set 0x1234; }; }'",
        on="node1",
        words=("wrong checksum",),
        storm=True,
        undo="nft delete table ip mangler; $ETHTOOL eth0 1",
        command=False,
    ),
    "a PublicIP that nobody has": Row(
        id="public-ip",
        plant="@restart --public-ip=192.0.2.77",
        words=("192.0.2.77", "--public-ip"),
        there="peer.arp",
    ),
}


@dataclass
class Broken:
    """The lab, and questions to it."""

    overlay: OverlayLab
    cni_dir: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def one(self) -> LabNode:
        return self.overlay.nodes[1]

    @property
    def two(self) -> LabNode:
        return self.overlay.nodes[2]

    def host(self, name: str) -> Host:
        return self.overlay.lab.hosts[name]

    def script(self, text: str) -> Path:
        """A Python program that shell scripts of rows may run."""
        path = self.overlay.directory / "script.py"
        path.write_text(text)
        return path

    async def set_up(self) -> None:
        overlay = self.overlay
        await overlay.build(2)
        await overlay.start_etcd({"Network": "10.5.0.0/16"})
        for node in overlay.nodes.values():
            await overlay.start_daemon(node, *FLAGS, SOURCE_CHECKS[node.number])
        await overlay.wait_ready()
        self.cni_dir.mkdir()
        (self.cni_dir / "10-flannel.conflist").write_text('{"plugins": [{"type": "flannel"}]}')
        for node in overlay.nodes.values():
            await overlay.add_pod(node)
            number = str(node.number)
            self.variables |= {
                f"SUBNET{number}": str(node.gateway.network),
                f"POD{number}": node.pod_address,
                f"KEY{number}": str(node.gateway.network).replace("/", "-"),
            }
            await self.masquerade(node)
        # A second way to the switch, for routes that leave by another one than they come in by.
        await overlay.lab.cable(self.two.host, "eth1", overlay.switch, "port2b")
        await overlay.switch.enslave("port2b", "br0")
        await self.two.host.configure("eth1")
        await self.two.host.sysctl("ipv4/conf/eth1/arp_ignore", 8)
        (link,) = json.loads(await must_run(self.one.host, *["ip", "-j", "link", "show", "eth0"]))
        mac = link["address"]
        etcdctl = f"env ETCDCTL_API=3 etcdctl --endpoints={overlay.etcd.url}"
        self.variables |= {
            "PATH": PATH,
            "MAC1": mac,
            "CNI": str(self.cni_dir),
            "NODE1": self.one.host.namespace,
            "ETHTOOL": f"{sys.executable} {self.script(CHECKSUMS)}",
            "PUT": f"{etcdctl} put {PREFIX}/subnets",
            "DEL": f"{etcdctl} del {PREFIX}/subnets",
        }
        await until(lambda: self.passes("pods"), "the lab carries pings")

    async def masquerade(self, node: LabNode) -> None:
        """As Docker and CNI plugins do."""
        rule = f"-s {node.gateway.network} ! -d 10.5.0.0/16 -j MASQUERADE"
        await must_run(node.host, *f"iptables -t nat -A POSTROUTING {rule}".split())

    async def passes(self, traffic: str) -> bool:
        """Whether packets of one kind arrive and are answered."""
        one, two = self.one, self.two
        if traffic == "nothing":
            return True
        host, argv = {
            "pods": (one.pod, (two.pod_address,)),
            "large": (one.pod, ("-s1400", "-Mdont", two.pod_address)),
            "outside": (two.pod, (STORE_ADDRESS,)),
            "node": (one.host, ("-I", one.public_ip, two.pod_address)),
        }[traffic or "pods"]
        done = await host.run("ping", "-qc1", "-W0.5", *argv)
        return done.returncode == 0

    async def sh(self, host: Host, script: str) -> None:
        done = await host.run("sh", "-c", script, environment=self.variables)
        assert done.returncode == 0, f"{script}: {done.stdout}{done.stderr}"

    async def doctor(self, number: int, *flags: str, given: bool = False) -> dict[str, Any]:
        """What a node's doctor says, as JSON; the document fits its schema, the ids the table."""
        node = self.overlay.nodes[number]
        argv = [TUNDP, "doctor", "--json", f"--cni-dir={self.cni_dir}", *flags]
        argv.append(f"--admin-socket={node.admin_socket}")
        if given:
            argv += [*self.overlay.store_flags, *FLAGS, *node.interface_flags]
            argv.append(SOURCE_CHECKS[number])
            argv += [f"--subnet-file={node.subnet_file}", f"--state-dir={node.state_dir}"]
        done = await node.host.run(*argv, environment={"PATH": PATH})
        assert done.stdout, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == found["exit_code"]
        validate(found, json.loads(diagnosis.schema_text()))
        unknown = [
            each["id"]
            for each in found["findings"]
            if each["verdict"] != "ok" and not is_known(each["id"])
        ]
        assert not unknown, "not in the table of docs/debugging.md"
        return found

    async def finds(self, number: int, row: Row) -> list[dict[str, Any]]:
        """The findings of a row's id and words."""
        found = await self.doctor(number, given=row.given)
        return [
            each
            for each in found["findings"]
            if each["id"] == row.id
            and each["verdict"] in row.verdicts
            and all(word in each["evidence"] for word in row.words)
        ]

    async def names(self, number: int, beginning: str) -> bool:
        """Whether a node's doctor warns of an id that begins so, and of the other node."""
        found = await self.doctor(number)
        other = f"192.0.2.{3 - number}"
        return any(
            each["id"].startswith(beginning) and each["verdict"] in WORSE
            for each in found["findings"]
            if other in each["evidence"] or beginning == "peer.arp"
        )

    async def is_fine(self, number: int, only: str) -> bool:
        """Whether a node's doctor finds nothing of this id."""
        found = await self.doctor(number, f"--only={only}")
        return not any(
            each["id"] == only and each["verdict"] in (*WORSE, "note")
            for each in found["findings"]
            if not each["id"].startswith("drop.") or each["verdict"] != "note"
        )


class Runner:
    """A lab and the loop it lives on, for all tests of this module."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.directory = make_directory()
        self.lab = Lab(f"td{os.getpid()}")
        self.broken = Broken(OverlayLab(self.lab, self.directory), self.directory / "cni")

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(main)

    def close(self) -> None:
        self.run(self._close())
        self.loop.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    async def _close(self) -> None:
        # A daemon that a printed command started is nobody's child here.
        for host in list(self.lab.hosts.values()):
            for pid in processes_in(host.namespace):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)
        await self.broken.overlay.close_etcd()
        await self.lab.__aexit__()


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    made = Runner()
    try:
        made.run(made.broken.set_up())
        yield made
    finally:
        made.close()


CHOSEN = tuple(ROWS) if os.environ.get("TUNDP_LABS") == "all" else tuple(ROWS)[::3]
"""Each takes seconds of traffic that fails first: a third in the suite, all by `make labs`."""


@pytest.mark.parametrize("name", CHOSEN)
def test_a_fault_is_named_and_its_command_mends_it(runner: Runner, name: str) -> None:
    runner.run(_plant_name_mend(runner.broken, ROWS[name]))


async def _plant_name_mend(broken: Broken, row: Row) -> None:
    node = broken.overlay.nodes[row.at]
    await until(lambda: broken.passes(row.traffic), "packets pass before the fault is planted")
    pid = (await broken.two.status()).pid
    broken.variables["PID2"] = str(pid)
    plant = row.plant
    if plant.startswith("@restart"):
        plant = _restart(broken.two, pid, plant.removeprefix("@restart"))
    try:
        await broken.sh(broken.host(row.on), plant)
        if row.traffic:
            await until(lambda: _fails(broken, row.traffic), "this is a fault", deadline_s=NAMED_S)
        storm = await _storm(broken) if row.storm else None
        named = broken.finds(row.at, row)
        if row.there:
            hit, is_named = await asyncio.gather(named, broken.names(1, row.there))
            if not is_named:
                await until(lambda: broken.names(1, row.there), f"node 1 names {row.there}")
        else:
            hit = await named
        if not hit:
            hit = await until(
                lambda: broken.finds(row.at, row), f"doctor names {row.id}", deadline_s=NAMED_S
            )
        if storm is not None:
            storm.kill()
        await _mend(broken, row, hit[0], node)
    finally:
        if row.undo:
            await broken.host(row.on).run("sh", "-c", row.undo, environment=broken.variables)
    await until(
        lambda: broken.is_fine(row.at, row.id), f"doctor finds no {row.id} any more", deadline_s=20
    )
    await until(lambda: broken.passes("pods"), "packets pass at the end", deadline_s=30)


async def _mend(broken: Broken, row: Row, hit: dict[str, Any], node: LabNode) -> None:
    assert hit["next_step"], "what to do is always said"
    if not row.command:
        await broken.sh(broken.host(row.on), row.undo)
    else:
        command = hit["command"]
        assert command and not hit["on"], hit
        assert command in hit["next_step"]
        await broken.sh(node.host, command)
    after = row.after or row.traffic
    await until(lambda: broken.passes(after), f"{hit['command'] or row.undo} helps", deadline_s=20)


async def _fails(broken: Broken, traffic: str) -> bool:
    return not await broken.passes(traffic)


async def _storm(broken: Broken) -> Any:
    """Pings that go on while doctor compares counters."""
    return await broken.one.pod.popen(["ping", "-q", "-i0.05", "-w30", broken.two.pod_address])


def _restart(node: LabNode, pid: int, flags: str) -> str:
    """Shell that ends the daemon and starts it with these flags more."""
    argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    wait = f"while grep -q . /proc/{pid}/cmdline 2>/dev/null; do sleep 0.1; done"
    started = f"setsid -f {shlex.join(argv)}{flags} </dev/null >>{node.log_path} 2>&1"
    return f"kill {pid}; {wait}; {started}"


def test_when_all_is_mended_nothing_is_wrong_on_either_node(runner: Runner) -> None:
    async def main() -> None:
        for number in (1, 2):
            await until(lambda n=number: fine(n), f"node {number} has nothing wrong", poll_s=0.5)
            assert not wrong

    wrong: list[str] = []

    async def fine(number: int) -> bool:
        found = await runner.broken.doctor(number)
        wrong[:] = [each["evidence"] for each in found["findings"] if each["verdict"] in WORSE]
        return not wrong and "peers" in found["looked_at"]

    runner.run(main())


SELF_MENDED = {
    "the TUN is deleted": "ip link del flannel0",
    "the TUN is set down": "ip link set flannel0 down",
    "the TUN loses its address": "ip addr flush dev flannel0",
    "the overlay's route is gone": "ip route del 10.5.0.0/16 dev flannel0",
    "subnet.env is overwritten": "echo FLANNEL_SUBNET=10.5.99.1/24 > $ENV2",
    "the uplink has another address": "ip addr del 192.0.2.2/24 dev eth0; ip addr add"
    " 192.0.2.52/24 dev eth0",
}
"""What the daemon itself mends: doctor has nothing to do, and soon nothing to say."""


@pytest.mark.parametrize("name", SELF_MENDED)
def test_what_the_daemon_mends_is_soon_no_finding(runner: Runner, name: str) -> None:
    broken = runner.broken
    broken.variables["ENV2"] = str(broken.two.subnet_file)

    async def mended() -> bool:
        if not await broken.passes("pods"):
            return False
        found = await broken.doctor(2, "--only=daemon,device,underlay,subnet-env,peer,lease")
        return bool(found["exit_code"] == 0)

    async def main() -> None:
        await until(lambda: broken.passes("pods"), "packets pass before")
        await broken.sh(broken.two.host, SELF_MENDED[name])
        await until(mended, "packets pass, and doctor finds nothing", poll_s=0.5)

    try:
        runner.run(main())
    finally:
        undo = "ip addr del 192.0.2.52/24 dev eth0; ip addr add 192.0.2.2/24 dev eth0"
        if "192.0.2.52" in SELF_MENDED[name]:
            runner.run(broken.two.host.run("sh", "-c", undo))


def test_fix_runs_one_command_and_looks_again(runner: Runner) -> None:
    broken = runner.broken
    node = broken.two

    async def fix(*flags: str) -> tuple[int, str]:
        argv = [TUNDP, "doctor", f"--admin-socket={node.admin_socket}", *flags]
        done = await node.host.run(*argv, environment={"PATH": PATH})
        return done.returncode, done.stdout + done.stderr

    async def main() -> None:
        name = "obstacle.forwarding"
        await broken.sh(node.host, "sysctl -q -w net.ipv4.ip_forward=0; ip link set cni0 mtu 1480")
        code, text = await fix(f"--fix={name}")
        assert code == 2
        assert "sysctl -w net.ipv4.ip_forward=1" in text
        assert "there is nobody: --yes" in text, "it asks, and nobody is there"
        assert not await broken.passes("pods"), "nothing was done"
        code, text = await fix(f"--fix={name}", "--yes")
        assert code == 0, text
        assert "mended: looked again, and it is gone" in text
        assert await broken.passes("pods")
        found = await broken.doctor(2, "--only=pods.mtu")
        assert found["exit_code"] == 3, "never two things"
        code, text = await fix("--fix=pods.mtu", "--yes")
        assert code == 0, text
        code, text = await fix("--fix=pods.mtu", "--yes")
        assert (code, text) == (0, "pods.mtu: not found\n")

    runner.run(main())


def test_a_command_for_another_node_is_not_run_here(runner: Runner) -> None:
    broken = runner.broken

    async def main() -> None:
        await broken.sh(broken.two.host, "iptables -I INPUT -p udp --dport 8285 -j DROP")
        try:
            await until(lambda: _fails(broken, "pods"), "this is a fault")
            argv = [TUNDP, "doctor", "--fix=peer.filtered", "--yes"]
            argv.append(f"--admin-socket={broken.one.admin_socket}")
            done = await broken.one.host.run(*argv, environment={"PATH": PATH})
            assert done.returncode == 1
            assert "this is for 192.0.2.2: tundp doctor" in done.stdout
        finally:
            await broken.sh(broken.two.host, "iptables -D INPUT -p udp --dport 8285 -j DROP")

    runner.run(main())


async def test_without_a_daemon_it_says_what_it_could_not_look_at(make_lab: MakeLab) -> None:
    async with make_lab() as lab:
        host = await lab.host("bare")
        directory = make_directory()
        try:
            argv = [TUNDP, "doctor", "--json", f"--subnet-file={directory}/subnet.env"]
            argv += [f"--state-dir={directory}", f"--store=file:{directory}/leases.json"]
            done = await host.run(*argv)
            found = json.loads(done.stdout)
        finally:
            shutil.rmtree(directory)
    assert done.returncode == found["exit_code"] == 1
    ids = {each["id"] for each in found["findings"]}
    assert {"daemon.dead", "not-looked.peers", "not-looked.drops"} <= ids
    assert not {"peers", "drops", "lease", "obstacles"} & set(found["looked_at"])


CHECKSUMS = """
import ctypes, fcntl, socket, struct, sys
value = ctypes.create_string_buffer(struct.pack("II", 0x17, int(sys.argv[2])))  # ETHTOOL_STXCSUM
request = struct.pack("16sP", sys.argv[1].encode(), ctypes.addressof(value))
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8946, request)  # SIOCETHTOOL
"""
"""Lets a device finish checksums, or not, as `ethtool -K DEVICE tx on|off`."""
