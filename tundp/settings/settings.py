"""The daemon's settings, one declaration each: Flannel's flags first, then tundp's own.

Every default, unit and check of a single value is here; what several say together is checked
by settings/sources.py. See settings/declare.py for what follows from a declaration.

Why one room: it is one table, and that all flags stand in one place is its point.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from pathlib import Path
from typing import Final

from tundp.choices import (
    Engine,
    EtcdApi,
    Layout,
    Loop,
    Offload,
    OnLeaseLost,
    PeerTools,
    Sandbox,
    SourceCheck,
)
from tundp.instance import SUBNET_FILE, Instance
from tundp.settings import parsers
from tundp.settings.declare import Flag, Section, flag, flags_of, show
from tundp.settings.parsers import Listen, StoreChoice

DEFAULT: Final = "default"
"""The origin of a setting nobody gave."""

_NOT_YET: Final = "leases from the Kubernetes API are not in tundp yet"
_NO_KLOG: Final = "tundp does not log with klog"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One daemon's settings, checked."""

    etcd_endpoints: tuple[str, ...] = flag(
        is_flannels=True,
        section=Section.LEASES,
        parse=parsers.parse_endpoints,
        default=("http://127.0.0.1:4001", "http://127.0.0.1:2379"),
        metavar="URL,...",
        help="etcd servers, tried in turn",
    )
    etcd_prefix: str = flag(
        is_flannels=True,
        section=Section.LEASES,
        default="/coreos.com/network",
        metavar="PATH",
        help="directory in etcd with the network config and the leases; one for each network",
    )
    etcd_username: str = flag(
        is_flannels=True,
        section=Section.LEASES,
        default="",
        metavar="NAME",
        help="user name, where etcd's auth is on",
        example="flannel",
    )
    etcd_password: str = flag(
        is_flannels=True,
        section=Section.LEASES,
        default="",
        help="password of --etcd-username; ps(1) shows a flag to everybody, a variable or file not;"
        " from the file of --config it is read again at each login",
        is_secret=True,
        example="secret",
    )
    etcd_cafile: str = flag(
        is_flannels=True,
        section=Section.LEASES,
        default="",
        metavar="FILE",
        takes_file=True,
        help="certificate of the authority that signed etcd's certificate",
        example="/etc/ssl/etcd/ca.pem",
        note="Readable for root, and not below /home or /root, which the unit cannot see.",
    )
    etcd_certfile: str = flag(
        is_flannels=True,
        section=Section.LEASES,
        default="",
        metavar="FILE",
        takes_file=True,
        help="client certificate for etcd",
        example="/etc/ssl/etcd/node.pem",
    )
    etcd_keyfile: str = flag(
        is_flannels=True,
        section=Section.LEASES,
        default="",
        metavar="FILE",
        takes_file=True,
        help="key of --etcd-certfile",
        example="/etc/ssl/etcd/node-key.pem",
    )
    iface: tuple[str, ...] = flag(
        is_flannels=True,
        section=Section.ADDRESS,
        default=(),
        metavar="NAME|IP",
        help="interface to the other nodes; repeatable, the first that fits is taken",
        default_text="the interface that has --public-ip, else that of the default route",
        is_repeatable=True,
        example="eth1",
    )
    iface_regex: tuple[str, ...] = flag(
        is_flannels=True,
        section=Section.ADDRESS,
        default=(),
        metavar="REGEX",
        help="interface by regular expression, matched against addresses, then against names;"
        " repeatable, tried after every --iface",
        is_repeatable=True,
        example="^eth[0-9]+$",
    )
    iface_can_reach: IPv4Address | None = flag(
        is_flannels=True,
        section=Section.ADDRESS,
        parse=parsers.parse_address,
        default=None,
        metavar="IP",
        help="interface the kernel's route to this address leaves by; tried last",
        example="192.0.2.1",
    )
    public_ip: IPv4Address | None = flag(
        is_flannels=True,
        section=Section.ADDRESS,
        parse=parsers.parse_address,
        default=None,
        metavar="IP",
        help="address other nodes send to, when it is not the interface's own (NAT)",
        example="192.0.2.10",
    )
    public_ipv6: IPv6Address | None = flag(
        is_flannels=True,
        section=Section.ADDRESS,
        parse=parsers.parse_address6,
        default=None,
        metavar="IP6",
        help="IPv6 address to advertise in a dual-stack network; the udp backend sends to none",
        example="2001:db8::10",
    )
    subnet_file: Path = flag(
        is_flannels=True,
        section=Section.NODE,
        parse=parsers.parse_file,
        default=SUBNET_FILE,
        metavar="FILE",
        takes_file=True,
        help="file to write this node's subnet and MTU to, for Docker and CNI; several daemons"
        " of one host need one each",
        note="Elsewhere than below /run/flannel, the unit needs ReadWritePaths= for it.",
    )
    subnet_lease_renew_margin_min: int = flag(
        "subnet-lease-renew-margin",
        is_flannels=True,
        section=Section.LEASES,
        parse=parsers.parse_margin,
        default=60,
        unit="minutes",
        help="renew the lease so long before it expires",
    )
    ip_masq: bool = flag(
        is_flannels=True,
        section=Section.FIREWALL,
        default=False,
        help="masquerade packets from the network to addresses outside it",
    )
    ip_masq_fully_random_disable: bool = flag(
        is_flannels=True,
        section=Section.FIREWALL,
        default=False,
        help="let masquerading keep source ports where it can (no --random-fully)",
    )
    iptables_resync_s: int = flag(
        "iptables-resync",
        is_flannels=True,
        section=Section.FIREWALL,
        parse=parsers.parse_resync,
        default=5,
        unit="seconds",
        help="how often to check the firewall rules, where the kernel does not report changes",
    )
    iptables_forward_rules: bool = flag(
        is_flannels=True,
        section=Section.FIREWALL,
        default=True,
        help="accept forwarding from and to the network; =false leaves the FORWARD chain alone",
    )
    ip_blackhole_route: bool = flag(
        is_flannels=True,
        section=Section.FIREWALL,
        default=False,
        help="install a blackhole route for this node's own subnet, used while no bridge has it",
    )
    healthz_ip: str = flag(
        is_flannels=True,
        section=Section.OBSERVE,
        parse=parsers.parse_health_ip,
        default="0.0.0.0",
        metavar="IP",
        help="address to serve /healthz and /readyz on",
    )
    healthz_port: int = flag(
        is_flannels=True,
        section=Section.OBSERVE,
        parse=parsers.parse_health_port,
        default=0,
        metavar="PORT",
        help="TCP port of /healthz and /readyz, 0 for none; ?verbose lists every check",
    )
    kube_subnet_mgr: bool = flag(
        is_flannels=True,
        section=Section.KUBERNETES,
        default=False,
        help="leases from the Kubernetes API; not in tundp yet: refused",
    )
    kube_api_url: str = flag(
        is_flannels=True,
        section=Section.KUBERNETES,
        default="",
        metavar="URL",
        help="Kubernetes API server; not in tundp yet: refused",
    )
    kubeconfig_file: str = flag(
        is_flannels=True,
        section=Section.KUBERNETES,
        default="",
        metavar="FILE",
        takes_file=True,
        help="kubeconfig; not in tundp yet: refused",
    )
    kube_annotation_prefix: str = flag(
        is_flannels=True,
        section=Section.KUBERNETES,
        default="flannel.alpha.coreos.com",
        metavar="PREFIX",
        help="prefix of node annotations; accepted, without effect",
        no_effect=_NOT_YET,
    )
    net_config_path: Path = flag(
        is_flannels=True,
        section=Section.KUBERNETES,
        parse=Path,
        default=Path("/etc/kube-flannel/net-conf.json"),
        metavar="FILE",
        takes_file=True,
        help="network config under Kubernetes; accepted, without effect",
        no_effect=_NOT_YET,
    )
    set_node_network_unavailable: bool = flag(
        is_flannels=True,
        section=Section.KUBERNETES,
        default=True,
        help="clear the node's NetworkUnavailable condition; accepted, without effect",
        no_effect=_NOT_YET,
    )
    v: int = flag(
        is_flannels=True,
        section=Section.LOG,
        parse=parsers.parse_int,
        default=0,
        metavar="LEVEL",
        help="log level: 0 changes, warnings and errors; 1 also renewals, retries and, with"
        " --engine=reference, each packet refused; below 0 errors only",
    )
    vmodule: str = flag(
        is_flannels=True,
        section=Section.LOG,
        default="",
        metavar="LIST",
        help="levels of single loggers, as in tundp.store=1,grpclib=1; secrets stay hidden",
    )
    log_backtrace_at: str = flag(
        "log_backtrace_at",
        is_flannels=True,
        section=Section.LOG,
        default="",
        metavar="FILE:LINE",
        help="klog's backtraces; accepted, without effect",
        no_effect=_NO_KLOG,
    )
    help: bool = flag(
        is_flannels=True,
        default=False,
        help="print this and exit; also -h",
        is_settable=False,
        has_variable=False,
    )
    version: bool = flag(
        is_flannels=True,
        default=False,
        help="print the version and exit",
        is_settable=False,
        # FLANNELD_VERSION has no effect in flannel either: images set it.
        has_variable=False,
    )
    config: Path | None = flag(
        parse=parsers.parse_path,
        default=None,
        metavar="FILE",
        takes_file=True,
        help='TOML file of settings, named as the flags are: ip-masq = true, iface = ["eth0"];'
        " `tundp config example` prints one",
        is_settable=False,
        example="/etc/tundp.toml",
    )
    etcd_api: EtcdApi = flag(
        section=Section.LEASES,
        choice=EtcdApi,
        default=EtcdApi.AUTO,
        help="API of etcd that holds the leases: auto is the one that has the network config, v3"
        " if both have; both registers this node in either, for a cluster of old and new flannels",
    )
    on_lease_lost: OnLeaseLost = flag(
        section=Section.LEASES,
        choice=OnLeaseLost,
        default=OnLeaseLost.REGAIN,
        help="when the lease is lost: keep forwarding and regain the same subnet, or exit with"
        " code 0 as flannel does",
    )
    force_takeover: bool = flag(
        section=Section.LEASES,
        default=False,
        help="take over the lease of another node with this node's PublicIP even while that node"
        " is alive",
    )
    state_dir: Path | None = flag(
        section=Section.NODE,
        parse=parsers.parse_path,
        default=Path("/var/lib/tundp"),
        metavar="DIR",
        takes_file=True,
        help="directory of the node id and the lease cache; empty: neither is kept",
    )
    fallback_route: bool = flag(
        section=Section.FIREWALL,
        default=True,
        help="install an unreachable route for the network, metric 4096, so that no packet leaks"
        " to the default gateway while the TUN device is gone",
    )
    metrics_addr: Listen | None = flag(
        section=Section.OBSERVE,
        parse=parsers.parse_listen,
        default=None,
        metavar="[IP]:PORT",
        help="address to serve Prometheus metrics on; :PORT means 127.0.0.1",
        default_text="not served",
        example=":9285",
    )
    metrics_peers: int = flag(
        section=Section.OBSERVE,
        parse=parsers.parse_metrics_peers,
        default=50,
        metavar="N",
        help="so many peers have metrics of their own, those with the most bytes; the others have"
        " one series together; at most 1000, 0: no metrics by peer",
        since="0.2.0",
    )
    store: StoreChoice = flag(
        section=Section.LEASES,
        parse=parsers.parse_store,
        default=StoreChoice(),
        metavar="etcd|file:PATH",
        help="where leases live; a file serves all network namespaces of one machine, and leases"
        " written by hand",
        example="file:/var/lib/tundp/leases.json",
        note="The unit can write a file below /var/lib/tundp only.",
    )
    engine: Engine = flag(
        section=Section.PACKETS,
        choice=Engine,
        default=Engine.AUTO,
        help="what moves the packets; auto is the fastest this machine has: `tundp probe` shows it",
    )
    disable_offloads: tuple[Offload, ...] = flag(
        section=Section.PACKETS,
        parse=parsers.parse_offloads,
        choices=tuple(each.value for each in Offload),
        default=(),
        metavar="NAME,...",
        help="offloads engine gso does not use, of " + ", ".join(each.value for each in Offload),
    )
    workers: int = flag(
        section=Section.PACKETS,
        parse=parsers.parse_workers,
        default=1,
        metavar="N",
        help="queues of the TUN device and sockets of the underlay; more than one pays with"
        " several busy peers and CPUs; engines gso and mmsg only",
    )
    layout: Layout = flag(
        section=Section.PACKETS,
        choice=Layout,
        default=Layout.SHARED,
        help="packet threads of each queue: one for both directions, or one for each",
    )
    cpus: tuple[int, ...] = flag(
        section=Section.PACKETS,
        parse=parsers.parse_cpus,
        default=(),
        metavar="N,...",
        help="CPUs to bind the packet threads to, in turn",
        default_text="the scheduler's choice",
    )
    spin_us: int = flag(
        "spin",
        section=Section.PACKETS,
        parse=parsers.parse_spin,
        default=50,
        unit="microseconds",
        help="between requests and answers, poll at most so long for the next packet before"
        " sleeping, and only while that pays; 0 for never",
    )
    loop: Loop = flag(
        section=Section.PACKETS,
        choice=Loop,
        default=Loop.AUTO,
        help="event loop; auto is uvloop where it is installed",
    )
    source_check: SourceCheck = flag(
        section=Section.PACKETS,
        choice=SourceCheck,
        default=SourceCheck.COUNT,
        help="packets whose sender does not hold the lease of their inner source, or whose inner"
        " destination is not this node's: off delivers them, count delivers and counts them,"
        " enforce drops them",
    )
    source_admit: tuple[IPv4Network, ...] = flag(
        section=Section.PACKETS,
        parse=parsers.parse_networks,
        default=(),
        metavar="NETWORK[,NETWORK...]",
        help="networks in no lease whose addresses the source check admits from every peer: hosts"
        " behind a node whose packets are not masqueraded",
    )
    peer_tools: PeerTools = flag(
        section=Section.PACKETS,
        choice=PeerTools,
        default=PeerTools.ON,
        help="ask other tundp nodes, and answer them, over the overlay: who they are, which peers"
        " answer them, and for a trace what became of packets between the two; off: neither, so"
        " that their questions get what a stock flanneld's kernel says",
        since="0.2.0",
    )
    tun_name: str = flag(
        section=Section.NODE,
        parse=parsers.parse_tun_name,
        default="flannel%d",
        metavar="NAME",
        help="name of the TUN device; %d becomes the lowest free number",
    )
    sandbox: Sandbox = flag(
        section=Section.NODE,
        choice=Sandbox,
        default=Sandbox.AUTO,
        help="after the start, let no file be written or program be run but those needed"
        " (Landlock), and refuse system calls and socket families nothing needs (seccomp); auto is"
        " what the kernel has, on refuses to start without all of it, or if other settings leave"
        " something open (endpoints with names: /etc)",
    )
    lease_ttl_s: int = flag(
        "lease-ttl",
        section=Section.LEASES,
        parse=parsers.parse_lease_ttl,
        default=parsers.LEASE_TTL_S,
        unit="seconds",
        help="how long a lease lasts without renewal; flannel's is 24 hours",
    )
    admin_socket: Path = flag(
        section=Section.OBSERVE,
        parse=parsers.parse_path,
        default=Instance().admin_socket,
        metavar="FILE",
        takes_file=True,
        help="unix socket a running daemon answers `tundp status` on",
        default_text=f"{Instance().admin_socket}; with another --subnet-file, one named after it",
    )
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    """Flag name to where its value came from: `--x`, a variable, a file, or `default`."""
    ignored: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    """Stray arguments, if they were to be ignored."""

    @property
    def instance(self) -> Instance:
        """Which daemon of this host."""
        return Instance(self.subnet_file)

    def describe(self) -> str:
        """The settings that were given, secrets blanked, for the log."""
        shown = [
            f"{each.name}={self.show(each)}"
            for each in FLAGS
            if self.origins.get(each.name, DEFAULT) != DEFAULT
        ]
        return " ".join(shown) or "all defaults"

    def show(self, flag: Flag) -> str:
        """One setting as a person would write it, a secret blanked."""
        value = getattr(self, flag.field)
        if flag.is_secret:
            return "***" if value else ""
        return show(value)

    def without_effect(self) -> list[str]:
        """The flags that were given and change nothing, a sentence each."""
        return [
            f"--{each.name} has no effect: {each.no_effect}"
            for each in FLAGS
            if each.no_effect and self.origins.get(each.name, DEFAULT) != DEFAULT
        ]


FLAGS: Final = flags_of(Settings)
"""Every flag of the daemon."""
SETTABLE: Final = tuple(each for each in FLAGS if each.is_settable)
"""The flags a configuration file may hold."""
