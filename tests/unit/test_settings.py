"""Flags and environment, in Go's syntax."""

from __future__ import annotations

import dataclasses
import os
import re
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest

from tundp.choices import (
    Engine,
    EtcdApi,
    Layout,
    Loop,
    Offload,
    OnLeaseLost,
    SourceCheck,
    StoreKind,
)
from tundp.errors import ConfigError
from tundp.instance import Instance
from tundp.settings.declare import Flag, parse_bool
from tundp.settings.parsers import StoreChoice, parse_int
from tundp.settings.settings import FLAGS, Settings
from tundp.settings.sources import load_settings, unknown_variables, variable_warnings


def refusal(*arguments: str, **environment: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(arguments, environment)
    return str(caught.value)


def test_defaults() -> None:
    assert load_settings([], {}) == Settings(
        etcd_endpoints=("http://127.0.0.1:4001", "http://127.0.0.1:2379"),
        etcd_prefix="/coreos.com/network",
        etcd_username="",
        etcd_password="",
        etcd_cafile="",
        etcd_certfile="",
        etcd_keyfile="",
        iface=(),
        iface_regex=(),
        iface_can_reach=None,
        public_ip=None,
        public_ipv6=None,
        subnet_file=Path("/run/flannel/subnet.env"),
        subnet_lease_renew_margin_min=60,
        ip_masq=False,
        ip_masq_fully_random_disable=False,
        iptables_resync_s=5,
        iptables_forward_rules=True,
        ip_blackhole_route=False,
        healthz_ip="0.0.0.0",
        healthz_port=0,
        kube_subnet_mgr=False,
        kube_api_url="",
        kubeconfig_file="",
        kube_annotation_prefix="flannel.alpha.coreos.com",
        net_config_path=Path("/etc/kube-flannel/net-conf.json"),
        set_node_network_unavailable=True,
        v=0,
        vmodule="",
        log_backtrace_at="",
        help=False,
        version=False,
        config=None,
        etcd_api=EtcdApi.AUTO,
        on_lease_lost=OnLeaseLost.REGAIN,
        force_takeover=False,
        state_dir=Path("/var/lib/tundp"),
        fallback_route=True,
        metrics_addr=None,
        metrics_peers=50,
        store=StoreChoice(),
        engine=Engine.AUTO,
        disable_offloads=(),
        workers=1,
        layout=Layout.SHARED,
        cpus=(),
        spin_us=50,
        loop=Loop.AUTO,
        source_check=SourceCheck.COUNT,
        tun_name="flannel%d",
        lease_ttl_s=86400,
        admin_socket=Path("/run/tundp/admin.sock"),
    )


def test_every_option_is_a_field_and_every_field_an_option() -> None:
    fields = {field.name for field in dataclasses.fields(Settings)} - {"origins", "ignored"}
    assert {option.field for option in FLAGS} == fields
    assert len(FLAGS) == len(fields)


@pytest.mark.parametrize(
    ("arguments", "field", "value", "breaks"),
    [
        (["-etcd-prefix", "/x"], "etcd_prefix", "/x", "one dash, a word"),
        (["--etcd-prefix", "/x"], "etcd_prefix", "/x", "two dashes, a word"),
        (["-etcd-prefix=/x"], "etcd_prefix", "/x", "one dash, ="),
        (["--etcd-prefix=/x"], "etcd_prefix", "/x", "two dashes, ="),
        (["--etcd-prefix=/a=b"], "etcd_prefix", "/a=b", "only the first = splits"),
        (["--etcd-prefix", "-v"], "etcd_prefix", "-v", "the next word is the value, dash or not"),
        (["--etcd-prefix="], "etcd_prefix", "", "an empty value is a value"),
        (["--etcd-prefix", ""], "etcd_prefix", "", "an empty word too"),
        (["-v", "1", "-v=2"], "v", 2, "the last one counts"),
        (["-version"], "version", True, "a boolean alone is true"),
        (["--version=true"], "version", True, "="),
        (["--version=F"], "version", False, "="),
        (["-version", "-v", "3"], "v", 3, "a boolean does not eat the next word"),
        (["--iface", "eth0"], "iface", ("eth0",), "repeatable, once"),
        (["--iface=a", "-iface", "b"], "iface", ("a", "b"), "repeatable, in order"),
        (["--iface=a,b"], "iface", ("a,b",), "flannel splits no commas here"),
        (
            ["--etcd-endpoints=http://192.0.2.1:1, http://192.0.2.2:2,"],
            "etcd_endpoints",
            ("http://192.0.2.1:1", "http://192.0.2.2:2"),
            "commas, blanks and empty items",
        ),
        (["--public-ip=192.0.2.1"], "public_ip", IPv4Address("192.0.2.1"), "an address"),
        (["--public-ip=240.10.0.1"], "public_ip", IPv4Address("240.10.0.1"), "class E"),
        (["--public-ip="], "public_ip", None, "empty is none"),
        (["--subnet-file=/a/b"], "subnet_file", Path("/a/b"), "a path"),
        (["--subnet-lease-renew-margin=1"], "subnet_lease_renew_margin_min", 1, "the least"),
        (["--subnet-lease-renew-margin=1439"], "subnet_lease_renew_margin_min", 1439, "the most"),
        (["--subnet-lease-renew-margin=0x10"], "subnet_lease_renew_margin_min", 16, "hex"),
        (["--store=file:/a"], "store", StoreChoice(StoreKind.FILE, Path("/a")), "a file store"),
        (["--engine=reference"], "engine", Engine.REFERENCE, "a choice"),
        (["--loop=asyncio"], "loop", Loop.ASYNCIO, "a choice"),
        (["--source-check=enforce"], "source_check", SourceCheck.ENFORCE, "a choice"),
        (["--tun-name=overlay%d"], "tun_name", "overlay%d", "a template"),
        (["--tun-name=a23456789012345"], "tun_name", "a23456789012345", "15 characters"),
        (["--tun-name=a2345678901234%d"], "tun_name", "a2345678901234%d", "15 once filled in"),
        (["--lease-ttl=1"], "lease_ttl_s", 1, "the least"),
        (["--admin-socket=/s"], "admin_socket", Path("/s"), "a path"),
    ],
)
def test_flags(arguments: list[str], field: str, value: Any, breaks: str) -> None:
    assert getattr(load_settings(arguments, {}), field) == value, breaks


@pytest.mark.parametrize(
    ("arguments", "texts", "breaks"),
    [
        (["--etcd-prefx=/x"], ["unknown flag --etcd-prefx:", "--etcd-prefix?"], "a typo"),
        (["-ifcae", "eth0"], ["unknown flag -ifcae:", "--iface?"], "a typo with one dash"),
        (["--qqqqqqq"], ["unknown flag --qqqqqqq:", "tundp run --help"], "nothing is near"),
        (["-vv"], ["unknown flag -vv"], "no bundling in Go"),
        (["-v2"], ["unknown flag -v2"], "no glued values in Go"),
        (["eth0"], ["unexpected argument 'eth0'"], "flannel ignores the rest"),
        (["-v", "1", "x", "-v"], ["unexpected argument 'x'"], "behind a flag"),
        (
            ["--version", "false"],
            ["unexpected argument 'false'", "boolean", "="],
            "booleans want =",
        ),
        (["-"], ["unexpected argument '-'"], "a dash alone"),
        ([""], ["unexpected argument ''"], "an empty word"),
        (["--", "x"], ["unexpected argument 'x'"], "nothing may follow the end of flags"),
        (["---v=1"], ["bad flag syntax: ---v"], "three dashes"),
        (["-=1"], ["bad flag syntax: -"], "no name"),
        (["-v"], ["flag needs an argument: --v LEVEL"], "missing value"),
        (["--iface=a", "--iface"], ["flag needs an argument: --iface"], "missing value, repeated"),
        (["--v=x"], ["--v 'x' is not a whole number"], "an int"),
        (["--v="], ["--v '' is not a whole number"], "an empty int"),
        (["--version=maybe"], ["--version 'maybe' is not true or false"], "a bool"),
        (["--version="], ["--version '' is not true or false"], "an empty bool"),
        (["--version=TRue"], ["--version 'TRue'"], "Go takes only some spellings"),
        (["--public-ip=192.0.2"], ["--public-ip '192.0.2'", "invalid public IP address"], "an IP"),
        (["--public-ip=2001:db8::1"], ["--public-ip '2001:db8::1'", "IPv4"], "the wrong family"),
        (["--subnet-lease-renew-margin=0"], ["--subnet-lease-renew-margin '0'", "1439"], "0"),
        (["--subnet-lease-renew-margin=1440"], ["'1440'", "from 1 to 1439"], "a whole lease"),
        (["--subnet-lease-renew-margin=-5"], ["'-5'"], "negative"),
        (["--lease-ttl=0"], ["--lease-ttl '0'", "at least 1"], "no lease at all"),
        (["--store=etcd3"], ["--store 'etcd3'", "file:PATH"], "an unknown store"),
        (["--store=file:"], ["--store 'file:'"], "a file store without a file"),
        (["--engine=c"], ["--engine 'c'", "auto", "reference"], "an unknown engine"),
        (["--loop=trio"], ["--loop 'trio'", "uvloop"], "an unknown loop"),
        (["--source-check=on"], ["--source-check 'on'", "off, count, enforce"], "a choice"),
        (["--tun-name="], ["--tun-name ''"], "no name"),
        (["--tun-name=a234567890123456"], ["--tun-name", "15"], "IFNAMSIZ"),
        (["--tun-name=a/b"], ["--tun-name 'a/b'"], "the kernel refuses /"),
        (["--tun-name=a b"], ["--tun-name 'a b'"], "the kernel refuses blanks"),
        (["--tun-name=a:b"], ["--tun-name 'a:b'"], "the kernel refuses :"),
        (["--tun-name=."], ["--tun-name '.'"], "the kernel refuses . and .."),
        (["--tun-name=.."], ["--tun-name '..'"], "the kernel refuses . and .."),
        (["--tun-name=éééééééé"], ["--tun-name"], "the kernel counts bytes: 16 here"),
        (["--etcd-endpoints="], ["--etcd-endpoints"], "no endpoint"),
        (["--etcd-endpoints=,"], ["--etcd-endpoints"], "no endpoint"),
        (["--etcd-certfile=c"], ["--etcd-keyfile is missing"], "half a client certificate"),
        (["--etcd-keyfile=k"], ["--etcd-certfile is missing"], "the other half"),
        (["--etcd-username=u"], ["--etcd-password is missing"], "half a login"),
        (["--etcd-password=p"], ["--etcd-username is missing"], "the other half"),
    ],
)
def test_refused(arguments: list[str], texts: list[str], breaks: str) -> None:
    message = refusal(*arguments)
    for text in texts:
        assert text in message, breaks


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("10", 10),
        ("-10", -10),
        ("+10", 10),
        ("0x1F", 31),
        ("0X1f", 31),
        ("0o17", 15),
        ("017", 15),
        ("-017", -15),
        ("00", 0),
        ("0b101", 5),
        ("0B11", 3),
        ("-0x10", -16),
        ("9223372036854775807", 2**63 - 1),
        ("-9223372036854775808", -(2**63)),
    ],
)
def test_int_forms(text: str, value: int) -> None:
    assert parse_int(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "x", "1.5", "08", "0x", "0b2", "0o8", "--5", "+-5", "1e3", "5 ", " 5", "5\n", "\u0663",
     "0\u0663", "\xb2", "9223372036854775808", "-9223372036854775809", "9" * 5000],
)  # fmt: skip
def test_not_ints_in_go(text: str) -> None:
    with pytest.raises(ValueError, match=r"whole number|range"):
        parse_int(text)


@pytest.mark.parametrize("text", ["1", "t", "T", "true", "TRUE", "True"])
def test_true(text: str) -> None:
    assert parse_bool(text) is True


@pytest.mark.parametrize("text", ["0", "f", "F", "false", "FALSE", "False"])
def test_false(text: str) -> None:
    assert parse_bool(text) is False


# Environment


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("FLANNELD_ETCD_PREFIX", "/e", "etcd_prefix", "/e"),
        (
            "FLANNELD_ETCD_ENDPOINTS",
            "http://192.0.2.1:1",
            "etcd_endpoints",
            ("http://192.0.2.1:1",),
        ),
        ("FLANNELD_IFACE", "eth0", "iface", ("eth0",)),
        ("FLANNELD_IFACE", "eth0,eth1", "iface", ("eth0,eth1",)),
        ("FLANNELD_PUBLIC_IP", "192.0.2.1", "public_ip", IPv4Address("192.0.2.1")),
        ("FLANNELD_SUBNET_FILE", "/f", "subnet_file", Path("/f")),
        ("FLANNELD_SUBNET_LEASE_RENEW_MARGIN", "30", "subnet_lease_renew_margin_min", 30),
        ("FLANNELD_V", "2", "v", 2),
        ("FLANNELD_V", "", "v", 0),
        ("FLANNELD_VERSION", "true", "version", False),
        ("FLANNELD_VERSION", "v0.28.9", "version", False),
        ("TUNDP_STORE", "file:/a", "store", StoreChoice(StoreKind.FILE, Path("/a"))),
        ("TUNDP_SOURCE_CHECK", "off", "source_check", SourceCheck.OFF),
        ("TUNDP_TUN_NAME", "t0", "tun_name", "t0"),
        ("TUNDP_LEASE_TTL", "0x20", "lease_ttl_s", 32),
        ("TUNDP_ADMIN_SOCKET", "/s", "admin_socket", Path("/s")),
        ("FLANNELD_STORE", "file:/a", "store", StoreChoice()),
        ("TUNDP_IFACE", "eth0", "iface", ()),
        ("flanneld_v", "2", "v", 0),
    ],
)
def test_environment(variable: str, text: str, field: str, value: Any) -> None:
    assert getattr(load_settings([], {variable: text}), field) == value


@pytest.mark.parametrize(
    ("arguments", "environment", "field", "value", "breaks"),
    [
        (["-v=1"], {"FLANNELD_V": "2"}, "v", 1, "a flag beats the environment"),
        (["--iface=a"], {"FLANNELD_IFACE": "b"}, "iface", ("a",), "also a repeatable one"),
        (["--etcd-prefix="], {"FLANNELD_ETCD_PREFIX": "/e"}, "etcd_prefix", "", "also when empty"),
        (["-v=1"], {"FLANNELD_V": "rubbish"}, "v", 1, "a variable not used is not read"),
        ([], {"FLANNELD_V": "2"}, "v", 2, "the environment beats the default"),
        (["--version=false"], {"FLANNELD_VERSION": "1"}, "version", False, "as ever"),
    ],
)
def test_precedence(
    arguments: list[Any | str],
    environment: dict[str, str],
    field: str,
    value: int | str | tuple[str],
    breaks: str,
) -> None:
    assert getattr(load_settings(arguments, environment), field) == value, breaks


@pytest.mark.parametrize(
    ("variable", "text", "why"),
    [
        ("FLANNELD_V", "x", "is not a whole number"),
        ("FLANNELD_PUBLIC_IP", "x", "invalid public IP address"),
        ("FLANNELD_SUBNET_LEASE_RENEW_MARGIN", "1440", "out of range"),
        ("TUNDP_STORE", "x", "neither etcd nor file:PATH"),
        ("TUNDP_LOOP", "x", "is not one of"),
    ],
)
def test_a_bad_variable_is_named(variable: str, text: str, why: str) -> None:
    message = refusal(**{variable: text})
    assert message.startswith(f"{variable} '{text}'")
    assert why in message


# Secrets


SECRET = "hunter2"


@pytest.mark.parametrize(
    "arguments",
    [
        [f"--etcd-password={SECRET}"],
        ["--etcd-password", SECRET],
        [f"--etcd-pasword={SECRET}"],
        [f"---etcd-password={SECRET}"],
        [f"--etcd-password={SECRET}", "--v=x"],
        [f"--etcd-password={SECRET}", "--nonsense"],
    ],
)
def test_a_password_is_in_no_message(arguments: list[str]) -> None:
    assert SECRET not in refusal(*arguments)


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["--etcd-username=u", f"--etcd-password={SECRET}"], {}),
        (["--etcd-username=u"], {"FLANNELD_ETCD_PASSWORD": SECRET}),
    ],
)
def test_a_password_is_not_described(arguments: list[str], environment: dict[str, Any]) -> None:
    text = load_settings(arguments, environment).describe()
    assert SECRET not in text
    assert "***" in text


def test_a_password_in_a_url_is_not_described_either() -> None:
    try:
        config = load_settings([f"--etcd-endpoints=http://root:{SECRET}@192.0.2.9:2379"], {})
    except ConfigError as error:
        assert SECRET not in str(error)
    else:
        assert SECRET not in config.describe()


def test_describe_shows_what_differs() -> None:
    assert load_settings([], {}).describe() == "all defaults"
    config = load_settings(["--iface=a", "--iface=b", "-v=1", "--public-ip=192.0.2.1"], {})
    assert config.describe() == "iface=a,b public-ip=192.0.2.1 v=1"


@pytest.mark.parametrize(
    ("store", "path"),
    [("etcd", None), ("file:/a/b.json", Path("/a/b.json")), ("file:rel", Path("rel"))],
)
def test_store_path(store: str, path: Path | None) -> None:
    assert load_settings([f"--store={store}"], {}).store.path == path


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_settings([], {}).v = 3  # type: ignore[misc]


# Every flag of flannel's


FLANNELS_FLAGS = {
    # name: (a value on the command line, what it becomes, flannel's default)
    "etcd-endpoints": (
        "http://192.0.2.1:1,http://192.0.2.2:2",
        ("http://192.0.2.1:1", "http://192.0.2.2:2"),
        ("http://127.0.0.1:4001", "http://127.0.0.1:2379"),
    ),
    "etcd-prefix": ("/x", "/x", "/coreos.com/network"),
    "etcd-keyfile": ("/k", "/k", ""),
    "etcd-certfile": ("/c", "/c", ""),
    "etcd-cafile": ("/ca", "/ca", ""),
    "etcd-username": ("u", "u", ""),
    "etcd-password": ("p", "p", ""),
    "iface": ("eth0", ("eth0",), ()),
    "iface-regex": ("^eth.*", ("^eth.*",), ()),
    "iface-can-reach": ("192.0.2.1", IPv4Address("192.0.2.1"), None),
    "public-ip": ("192.0.2.1", IPv4Address("192.0.2.1"), None),
    "public-ipv6": ("2001:db8::1", IPv6Address("2001:db8::1"), None),
    "subnet-file": ("/s", Path("/s"), Path("/run/flannel/subnet.env")),
    "subnet-lease-renew-margin": ("0x3c", 60, 60),
    "ip-masq": ("T", True, False),
    "ip-masq-fully-random-disable": ("1", True, False),
    "iptables-resync": ("010", 8, 5),
    "iptables-forward-rules": ("False", False, True),
    "ip-blackhole-route": ("true", True, False),
    "kube-subnet-mgr": ("0", False, False),
    "kube-api-url": ("", "", ""),
    "kubeconfig-file": ("", "", ""),
    "kube-annotation-prefix": ("a.b/c", "a.b/c", "flannel.alpha.coreos.com"),
    "net-config-path": ("/n", Path("/n"), Path("/etc/kube-flannel/net-conf.json")),
    "set-node-network-unavailable": ("f", False, True),
    "healthz-ip": ("127.0.0.1", "127.0.0.1", "0.0.0.0"),
    "healthz-port": ("10244", 10244, 0),
    "v": ("0b101", 5, 0),
    "vmodule": ("a=2", "a=2", ""),
    "log_backtrace_at": ("a.go:7", "a.go:7", ""),
    "version": ("false", False, False),
}
"""Written down from the compatibility specification's section on the command line."""
PAIRS = {
    "etcd-keyfile": ["--etcd-certfile=c"],
    "etcd-certfile": ["--etcd-keyfile=k"],
    "etcd-username": ["--etcd-password=p"],
    "etcd-password": ["--etcd-username=u"],
}
FIELD_OF = {option.name: option.field for option in FLAGS}
VARIABLE_OF = {name: f"FLANNELD_{name.upper().replace('-', '_')}" for name in FLANNELS_FLAGS}


@pytest.mark.parametrize("name", FLANNELS_FLAGS)
@pytest.mark.parametrize("form", ["-{}={}", "--{}={}", "-{} {}", "--{} {}"])
def test_flannels_flags_in_every_form(name: str, form: str) -> None:
    text, value, default = FLANNELS_FLAGS[name]
    is_boolean = isinstance(default, bool)
    arguments = [form.format(name, text)] if "=" in form else [form.split()[0].format(name), text]
    if is_boolean and "=" not in form:
        arguments = [f"{arguments[0]}={text}"]
    more = PAIRS.get(name, [])
    field = FIELD_OF[name]
    assert getattr(load_settings([], {}), field) == default
    config = load_settings([*arguments, *more], {})
    assert getattr(config, field) == value
    assert config.origins[name] == f"--{name}"


@pytest.mark.parametrize("name", sorted(FLANNELS_FLAGS.keys() - {"version"}))
def test_flannels_flags_as_variables(name: str) -> None:
    text, value, default = FLANNELS_FLAGS[name]
    config = load_settings(PAIRS.get(name, []), {VARIABLE_OF[name]: text})
    if not text:
        value = default
    assert getattr(config, FIELD_OF[name]) == value
    assert config.origins[name] == (VARIABLE_OF[name] if text else "default")


def test_flannels_booleans_are_ours() -> None:
    """A boolean that took the next word would eat the flag behind it."""
    booleans = {name for name, (_, _, default) in FLANNELS_FLAGS.items() if default in (True, False)
                and isinstance(default, bool)}  # fmt: skip
    ours = {option.name for option in FLAGS if option.is_boolean and option.is_flannels}
    assert ours - {"help"} == booleans
    repeatable = {option.name for option in FLAGS if option.is_repeatable}
    assert repeatable == {"iface", "iface-regex"}


def test_no_other_flag_passes_for_flannels() -> None:
    flannels = {option.name for option in FLAGS if option.is_flannels}
    assert flannels == FLANNELS_FLAGS.keys() | {"help"}


def test_every_variable_is_flannels_or_ours() -> None:
    for option in FLAGS:
        prefix = "FLANNELD_" if option.name in FLANNELS_FLAGS else "TUNDP_"
        expected = prefix + option.name.replace("-", "_").upper()
        assert option.variable == ("" if option.name in ("help", "version") else expected)


@pytest.mark.parametrize("text", ["1", "t", "T", "true", "TRUE", "True"])
@pytest.mark.parametrize("name", ["ip-masq", "ip-blackhole-route"])
def test_true_on_the_command_line(name: str, text: str) -> None:
    assert getattr(load_settings([f"-{name}={text}"], {}), name.replace("-", "_")) is True


@pytest.mark.parametrize("text", ["0", "f", "F", "false", "FALSE", "False"])
def test_false_on_the_command_line(text: str) -> None:
    assert load_settings([f"--iptables-forward-rules={text}"], {}).iptables_forward_rules is False


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("kube-subnet-mgr", "true"),
        ("kube-api-url", "https://192.0.2.1"),
        ("kubeconfig-file", "/k"),
    ],
)
def test_kubernetes_is_refused_not_ignored(name: str, text: str) -> None:
    for message in (
        refusal(f"--{name}={text}"),
        refusal(**{VARIABLE_OF[name]: text}),
    ):
        assert message.startswith(f"--{name}: ")
        assert "not yet in tundp" in message
        assert "--etcd-endpoints" in message
        assert "--store=file:PATH" in message


def test_flags_without_effect_are_taken() -> None:
    arguments = [
        "--kube-annotation-prefix=a.b/c",
        "--net-config-path=/n",
        "--set-node-network-unavailable=false",
        "--vmodule=a=2",
        "--log_backtrace_at=a.go:7",
        "--kube-subnet-mgr=false",
    ]
    config = load_settings(arguments, {})
    assert config.kube_annotation_prefix == "a.b/c"
    assert config.set_node_network_unavailable is False


@pytest.mark.parametrize(
    ("arguments", "environment", "names"),
    [
        ([], {}, []),
        (["--ip-masq", "--kube-subnet-mgr=false"], {}, []),
        (["--kube-annotation-prefix=a.b/c"], {}, ["kube-annotation-prefix"]),
        (["--set-node-network-unavailable=false"], {}, ["set-node-network-unavailable"]),
        ([], {"FLANNELD_NET_CONFIG_PATH": "/n"}, ["net-config-path"]),
        (["--log_backtrace_at=a.go:7"], {}, ["log_backtrace_at"]),
    ],
)
def test_flags_without_effect_are_named(
    arguments: list[Any | str], environment: dict[str, Any], names: list[Any | str]
) -> None:
    sentences = load_settings(arguments, environment).without_effect()
    assert [sentence.split()[0] for sentence in sentences] == [f"--{name}" for name in names]
    for sentence in sentences:
        assert re.fullmatch(r"--\S+ has no effect: .+", sentence)


@pytest.mark.parametrize("name", ["listen", "remote", "use-multi-cluster-cidr"])
def test_flags_flannel_itself_dropped_are_unknown(name: str) -> None:
    assert f"unknown flag --{name}" in refusal(f"--{name}=x")


@pytest.mark.parametrize(
    ("arguments", "texts", "breaks"),
    [
        (["--iptables-resync=0"], ["--iptables-resync '0'", "at least 1"], "flannel: a busy loop"),
        (["--iptables-resync=-1"], ["'-1'"], "flannel: a busy loop"),
        (["--iptables-resync=1s"], ["'1s'", "whole number"], "no durations"),
        (["--healthz-port=-1"], ["--healthz-port '-1'", "port"], "no port"),
        (["--healthz-port=65536"], ["'65536'"], "no port"),
        (["--healthz-port=http"], ["whole number"], "no service names"),
        (["--healthz-ip=example.com"], ["--healthz-ip 'example.com'", "127.0.0.1"], "no names"),
        (["--iface-can-reach=x"], ["--iface-can-reach 'x'", "IPv4"], "an address"),
        (["--public-ipv6=192.0.2.1"], ["--public-ipv6", "IPv6"], "the wrong family"),
        (["--public-ip=127.0.0.1"], ["no address of a host"], "peers would send to themselves"),
        (["--public-ip=224.0.0.1"], ["no address of a host"], "multicast"),
        (["--public-ip=255.255.255.255"], ["no address of a host"], "broadcast"),
        (["--public-ip=0.0.0.0"], ["no address of a host"], "flannel: a loop"),
        (["--metrics-addr=9285"], ["--metrics-addr '9285'", "ADDRESS:PORT"], "no colon"),
        (["--metrics-addr=:"], ["ADDRESS:PORT"], "no port"),
        (["--metrics-addr=:0"], ["ADDRESS:PORT"], "a port nobody could know"),
        (["--metrics-addr=:65536"], ["ADDRESS:PORT"], "no port"),
        (["--metrics-addr=:http"], ["ADDRESS:PORT"], "no service names"),
        (["--metrics-addr=localhost:9285"], ["ADDRESS:PORT"], "no host names"),
        (["--metrics-addr=192.0.2:9285"], ["ADDRESS:PORT"], "no address"),
        (["--etcd-api=v4"], ["--etcd-api 'v4'", "auto, v2, v3, both"], "a choice"),
        (["--on-lease-lost=stay"], ["regain, exit"], "a choice"),
        (["--disable-offloads=tso"], ["'tso'", "tun-tso"], "a name"),
        (["--source-admit=203.0.113.7/24"], ["'203.0.113.7/24'", "host bits"], "host bits"),
        (["--source-admit=10.0.0.0/8,x"], ["'x'", "no IPv4 network"], "no network"),
        (["--source-admit=" + ",".join(["10.0.0.0/8"] * 17)], ["17 networks", "16"], "too many"),
        (["--workers=0"], ["--workers '0'"], "none"),
        (["--spin=1001"], ["--spin '1001'"], "a CPU for ever"),
        (["--cpus=100000"], ["CPU 100000"], "not there"),
        (["--etcd-endpoints=http://u:p@192.0.2.1:1"], ["FLANNELD_ETCD_PASSWORD"], "a secret"),
    ],
)
def test_refused_values(arguments: list[str], texts: list[str], breaks: str) -> None:
    message = refusal(*arguments)
    for text in texts:
        assert text in message, breaks


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("127.0.0.1:9285", ("127.0.0.1", 9285)),
        (":9285", ("127.0.0.1", 9285)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("[2001:DB8::0:1]:80", ("2001:db8::1", 80)),
    ],
)
def test_metrics_address(text: str, value: tuple[str, int] | None) -> None:
    assert load_settings([f"--metrics-addr={text}"], {}).metrics_addr == value


@pytest.mark.parametrize("text", ["::1:9285", ": 80", ":8_0", ":+80", "]127.0.0.1[:80"])
def test_what_is_no_metrics_address(text: str) -> None:
    assert "ADDRESS:PORT" in refusal(f"--metrics-addr={text}")


def test_cpus_are_those_there_are() -> None:
    cpu = min(os.sched_getaffinity(0))
    config = load_settings([f"--cpus={cpu}"], {})
    assert config.cpus == (cpu,)
    assert config.describe() == f"cpus={cpu}"


# Unknown variables


def test_unknown_variables_are_named() -> None:
    environment = {
        "FLANNELD_VERSION": "v0.28.9",
        "FLANNELD_IFACE": "eth0",
        "FLANNELD_IFCAE": "eth0",
        "FLANNELD_EMPTY": "",
        "TUNDP_IFACE": "eth0",
        "TUNDP_STORE": "etcd",
        "ETCD_PREFIX": "/x",
        "flanneld_v": "1",
    }
    assert unknown_variables(environment) == ["FLANNELD_IFCAE", "TUNDP_IFACE"]


# What got into a variable by accident

VARIABLES = [each for each in FLAGS if each.variable and not each.is_secret]
LINKS = {
    "FLANNELD_SERVICE_HOST": "10.96.0.5",
    "FLANNELD_SERVICE_PORT": "8285",
    "FLANNELD_SERVICE_PORT_HTTP_ALT": "8080",
    "FLANNELD_PORT": "tcp://10.96.0.5:8285",
    "FLANNELD_PORT_8285_UDP": "udp://10.96.0.5:8285",
    "FLANNELD_PORT_8285_UDP_PROTO": "udp",
    "FLANNELD_PORT_8285_UDP_PORT": "8285",
    "FLANNELD_PORT_8285_UDP_ADDR": "10.96.0.5",
    "TUNDP_METRICS_SERVICE_HOST": "10.96.0.6",
}


@pytest.mark.parametrize("flag", VARIABLES, ids=lambda flag: flag.name)
@pytest.mark.parametrize(
    "text", ["tcp://10.96.0.5:8080", "udp://[fd00::1]:53", "sctp://10.96.0.5:1", '"tcp://h:1"']
)
def test_a_service_link_is_as_if_not_set(flag: Flag, text: str) -> None:
    settings = load_settings([], {flag.variable: text})
    assert settings == load_settings([], {})
    assert settings.origins[flag.name] == "default"
    (sentence,) = variable_warnings({flag.variable: text})
    assert flag.variable in sentence
    assert "service link" in sentence


@pytest.mark.parametrize("flag", VARIABLES, ids=lambda flag: flag.name)
def test_nothing_in_quotes_or_blanks_is_as_if_not_set(flag: Flag) -> None:
    for text in ('""', "''", " ", "\r", '" "', " \t\r\n"):
        assert load_settings([], {flag.variable: text}) == load_settings([], {}), text
        (sentence,) = variable_warnings({flag.variable: text})
        assert flag.variable in sentence
    assert variable_warnings({flag.variable: ""}) == []


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("FLANNELD_HEALTHZ_PORT", '"8080"', "healthz_port", 8080),
        ("FLANNELD_HEALTHZ_PORT", "'8080'", "healthz_port", 8080),
        ("FLANNELD_HEALTHZ_PORT", "8080\r", "healthz_port", 8080),
        ("FLANNELD_HEALTHZ_PORT", '"8080"\r\n', "healthz_port", 8080),
        ("FLANNELD_HEALTHZ_PORT", '" 8080 "', "healthz_port", 8080),
        ("FLANNELD_HEALTHZ_PORT", "\ufeff8080\u00a0", "healthz_port", 8080),
        ("FLANNELD_IP_MASQ", '"true"', "ip_masq", True),
        ("FLANNELD_IP_MASQ", "true ", "ip_masq", True),
        ("FLANNELD_IFACE", "'eth0'", "iface", ("eth0",)),
        ("FLANNELD_ETCD_ENDPOINTS", '"http://a:1,http://b:1"', "etcd_endpoints", None),
        ("FLANNELD_SUBNET_FILE", "/run/x.env\r", "subnet_file", Path("/run/x.env")),
        ("TUNDP_SOURCE_CHECK", '"enforce"', "source_check", SourceCheck.ENFORCE),
    ],
)
def test_quotes_and_line_ends_are_left_out(
    variable: str, text: str, field: str, value: object
) -> None:
    found = getattr(load_settings([], {variable: text}), field)
    assert found == (("http://a:1", "http://b:1") if value is None else value)
    (sentence,) = variable_warnings({variable: text})
    assert variable in sentence
    assert "without quotes and blanks around" in sentence


@pytest.mark.parametrize(
    "text", ["80a", "tcp", "tcp://", "http://10.96.0.5:8080", "10.96.0.5:8080", '"80a"', '"8080']
)
def test_a_typo_stays_an_error(text: str) -> None:
    assert "FLANNELD_HEALTHZ_PORT" in refusal(FLANNELD_HEALTHZ_PORT=text)


@pytest.mark.parametrize("text", ["tcp://10.96.0.5:8080", '"8080"'])
def test_a_flag_is_no_accident(text: str) -> None:
    assert "--healthz-port" in refusal(f"--healthz-port={text}")


@pytest.mark.parametrize("text", ['"secret"', "secret ", "secret\r", '""'])
def test_a_password_is_taken_as_it_is_and_not_shown(text: str) -> None:
    environment = {"FLANNELD_ETCD_USERNAME": "u", "FLANNELD_ETCD_PASSWORD": text}
    assert load_settings([], environment).etcd_password == text
    (sentence,) = variable_warnings(environment)
    assert "FLANNELD_ETCD_PASSWORD" in sentence
    assert "secret" not in sentence


def test_the_links_of_a_service_are_one_sentence() -> None:
    assert unknown_variables(LINKS) == []
    links, *rest = variable_warnings(LINKS)
    assert "Kubernetes' links" in links
    assert len(rest) == 0, rest
    assert load_settings([], LINKS) == load_settings([], {})


# The file


class SettingsFile:
    """A file at `path`; calling it writes a text there and loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, text: str, *arguments: str, **environment: str) -> Settings:
        self.path.write_text(text, encoding="utf-8")
        return load_settings([f"--config={self.path}", *arguments], environment)


@pytest.fixture
def file(tmp_path: Path) -> SettingsFile:
    return SettingsFile(tmp_path / "tundp.toml")


def test_flag_over_variable_over_file_over_default(file: SettingsFile) -> None:
    text = 'etcd-prefix = "/file"\nv = 1\niface = ["a", "b"]\nspin = 7\n'
    config = file(text, "--etcd-prefix=/flag", FLANNELD_ETCD_PREFIX="/variable", FLANNELD_V="2")
    assert (config.etcd_prefix, config.v, config.iface, config.spin_us) == (
        "/flag",
        2,
        ("a", "b"),
        7,
    )
    assert config.workers == 1
    assert config.origins["etcd-prefix"] == "--etcd-prefix"
    assert config.origins["v"] == "FLANNELD_V"
    assert config.origins["iface"] == config.origins["spin"] == str(file.path)
    assert config.origins["workers"] == "default"
    assert config.origins.keys() == {option.name for option in FLAGS}


def test_repeatable_flags_replace_and_are_not_added_to(file: SettingsFile) -> None:
    assert file('iface = ["a", "b"]', "--iface=c").iface == ("c",)
    assert file('iface = ["a", "b"]', FLANNELD_IFACE="c,d").iface == ("c,d",)


def test_empty_variables_do_not_hide_the_file(file: SettingsFile) -> None:
    assert file("v = 3", FLANNELD_V="").v == 3


def test_the_file_may_be_named_by_a_variable(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("v = 3")
    assert load_settings([], {"TUNDP_CONFIG": str(path)}).v == 3
    assert load_settings([], {"FLANNELD_CONFIG": str(path)}).v == 0
    other = tmp_path / "b.toml"
    other.write_text("v = 4")
    assert load_settings([f"--config={other}"], {"TUNDP_CONFIG": str(path)}).v == 4
    assert load_settings(["--config="], {}).config is None


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("ip-masq = true", "ip_masq", True),
        ("iptables-forward-rules = false", "iptables_forward_rules", False),
        ('ip-masq = "true"', "ip_masq", True),
        ("v = 2", "v", 2),
        ('v = "0x10"', "v", 16),
        ("healthz-port = 0x50", "healthz_port", 80),
        ('iface = "eth0"', "iface", ("eth0",)),
        ('iface = ["eth0", "eth1"]', "iface", ("eth0", "eth1")),
        ("iface = []", "iface", ()),
        ('iface-regex = ["^a,b$"]', "iface_regex", ("^a,b$",)),
        (
            'etcd-endpoints = ["http://192.0.2.1:1", "http://192.0.2.2:2"]',
            "etcd_endpoints",
            ("http://192.0.2.1:1", "http://192.0.2.2:2"),
        ),
        ('etcd-endpoints = "http://192.0.2.1:1"', "etcd_endpoints", ("http://192.0.2.1:1",)),
        (
            'disable-offloads = ["tun-tso", "udp-gro"]',
            "disable_offloads",
            (Offload.TUN_TSO, Offload.UDP_GRO),
        ),
        ("disable-offloads = []", "disable_offloads", ()),
        ("cpus = []", "cpus", ()),
        ('public-ip = "192.0.2.1"', "public_ip", IPv4Address("192.0.2.1")),
        ('public-ip = ""', "public_ip", None),
        ('metrics-addr = ":9285"', "metrics_addr", ("127.0.0.1", 9285)),
        ('state-dir = ""', "state_dir", None),
        ("", "v", 0),
        ("# nothing", "v", 0),
    ],
)
def test_values_of_a_file(file: SettingsFile, text: str, field: str, value: Any) -> None:
    assert getattr(file(text), field) == value


@pytest.mark.parametrize(
    ("text", "texts", "breaks"),
    [
        ("v = true", ["v is true, but must be not true or false"], "a bool for an int"),
        ("ip-masq = 1", ["ip-masq is 1, but must be true or false"], "an int for a bool"),
        ("v = 1.5", ["v is neither text, number"], "a fraction"),
        ("v = 1979-05-27", ["v is neither text, number"], "a date"),
        ("v = {a = 1}", ["v is neither text, number"], "a table"),
        ("iface = [[1]]", ["iface is neither text, number"], "lists in lists"),
        (
            "ip-masq = [true, false]",
            ["ip-masq is a list, but takes one value"],
            "a list for a bool",
        ),
        ('v = "x"', ["v 'x' is not a whole number"], "the flag's own rules"),
        ("iptables-resync = 0", ["iptables-resync '0'", "at least 1"], "the flag's own rules"),
        ('etcd_prefix = "/x"', ["unknown key etcd_prefix", "did you mean etcd-prefix?"], "_"),
        ('ifcae = "eth0"', ["unknown key ifcae", "did you mean iface?"], "a typo"),
        ("[etcd]\nprefix = 1", ["unknown key etcd"], "a table"),
        ("qqqqqqq = 1", ["unknown key qqqqqqq", "keys are named as the flags are"], "far off"),
        ('config = "/x"', ["unknown key config"], "no files in files"),
        ("version = true", ["unknown key version"], "no commands in files"),
        ("help = true", ["unknown key help"], "no commands in files"),
        ("v = \n", ["is not TOML", "line 1"], "syntax"),
        ("v = 1\nv = 2", ["is not TOML"], "twice"),
        ("FLANNELD_IFACE=eth0", ["is not TOML"], "a file of variables"),
        ('etcd-certfile = "c"', ["--etcd-keyfile is missing"], "checked like flags"),
        ("kube-subnet-mgr = true", ["not yet in tundp"], "checked like flags"),
    ],
)
def test_refused_files(file: SettingsFile, text: str, texts: list[str], breaks: str) -> None:
    with pytest.raises(ConfigError) as caught:
        file(text)
    message = str(caught.value)
    assert str(file.path) in message or message.startswith("--")
    for expected in texts:
        assert expected in message, breaks


@pytest.mark.parametrize("text", ['etcd-prefix = ["/a", "/b"]', 'store = ["etcd"]', "v = [1]"])
def test_a_list_is_for_flags_that_take_several(file: SettingsFile, text: str) -> None:
    with pytest.raises(ConfigError):
        file(text)


@pytest.mark.parametrize(
    ("path", "why"),
    [("/nonexistent/tundp.toml", "No such file or directory"), ("/", "Is a directory")],
)
def test_a_file_that_cannot_be_read(path: str, why: str) -> None:
    message = refusal(f"--config={path}")
    assert message == f"--config {path}: {why}"
    assert refusal(TUNDP_CONFIG=path) == message


def test_a_file_of_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(b"v = 1 # \xff")
    assert "is not TOML" in refusal(f"--config={path}")


def test_a_flag_saves_nobody_from_a_wrong_file(file: SettingsFile) -> None:
    with pytest.raises(ConfigError, match="--etcd-keyfile is missing"):
        file('etcd-certfile = "c"', "--v=1")
    with pytest.raises(ConfigError, match="v 'x' is not"):
        file('v = "x"', "--v=1")


@pytest.mark.parametrize(
    "text",
    [
        f'etcd-password = "{SECRET}"\nv = "x"',
        f'etcd-password = "{SECRET}"\netcd-pasword = "{SECRET}"',
        f'etcd-pasword = "{SECRET}"',
        f'etcd-password = "{SECRET}"\n=',
        f'etcd-password = "{SECRET}" "{SECRET}"',
        f'etcd-password = "{SECRET}',
        f'etcd-password = ["{SECRET}", 1.5]',
        f'etcd-endpoints = "http://u:{SECRET}@192.0.2.1:1"',
        f'etcd-password = "{SECRET}"',
    ],
)
def test_a_password_in_a_file_is_in_no_message(file: SettingsFile, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        file(text)
    assert SECRET not in str(caught.value)


def test_a_password_in_a_file_is_not_described(file: SettingsFile) -> None:
    config = file(f'etcd-username = "u"\netcd-password = "{SECRET}"')
    assert config.etcd_password == SECRET
    assert SECRET not in config.describe()
    assert SECRET not in repr(config)
    for option in FLAGS:
        assert SECRET not in config.show(option)
    assert "etcd-password=***" in config.describe()


# Stray arguments


@pytest.mark.parametrize(
    ("arguments", "iface", "ignored"),
    [
        (["--iface=a"], ("a",), ()),
        (["--iface=a", "stray", "--iface=b"], ("a",), ("stray", "--iface=b")),
        (["stray"], (), ("stray",)),
        (["--iface=a", "--", "--iface=b"], ("a",), ("--iface=b",)),
        (["--iface=a", "-", "--iface=b"], ("a",), ("-", "--iface=b")),
        (["--iface=a", "--"], ("a",), ()),
        (["--ip-masq", "true", "--iface=b"], (), ("true", "--iface=b")),
        (["", "--iface=b"], (), ("", "--iface=b")),
    ],
)
def test_stray_arguments_end_the_flags_as_in_flannel(
    arguments: list[str], iface: tuple[Any, ...], ignored: tuple[Any, ...]
) -> None:
    config = load_settings(arguments, {}, ignores_stray=True)
    assert (config.iface, config.ignored) == (iface, ignored)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [(["--ifcae=a"], "unknown flag"), (["---v"], "bad flag syntax"), (["-v"], "needs an argument")],
)
def test_wrong_flags_are_wrong_even_then(arguments: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load_settings(arguments, {}, ignores_stray=True)


# Several daemons of one host


def test_one_daemon_has_flannels_names() -> None:
    config = load_settings([], {})
    assert config.instance.name == ""
    assert config.admin_socket == Path("/run/tundp/admin.sock")
    assert load_settings(["--subnet-file=/run/flannel/subnet.env"], {}).instance == Instance()


def test_another_subnet_file_is_another_instance() -> None:
    one = load_settings(["--subnet-file=/run/flannel/b.env"], {})
    other = load_settings(["--subnet-file=/run/flannel/c.env"], {})
    assert one.instance.name == "run-flannel-b.env"
    assert one.admin_socket == Path("/run/tundp/run-flannel-b.env.sock")
    assert other.admin_socket != one.admin_socket
    said = load_settings(["--subnet-file=/run/flannel/b.env", "--admin-socket=/s"], {})
    assert said.admin_socket == Path("/s")


def test_the_subnet_file_of_a_file_or_variable_counts_too(file: SettingsFile) -> None:
    assert file('subnet-file = "/run/b.env"').instance.name == "run-b.env"
    assert load_settings([], {"FLANNELD_SUBNET_FILE": "/run/b.env"}).instance.name == "run-b.env"


def test_a_long_subnet_file_still_makes_a_socket() -> None:
    path = f"/run/{'a' * 60}/{'b' * 60}/subnet.env"
    socket = load_settings([f"--subnet-file={path}"], {}).admin_socket
    assert len(os.fsencode(socket)) <= 107
    assert socket.name.endswith("subnet.env.sock")


def test_what_flannel_takes_is_taken() -> None:
    assert load_settings(["--healthz-ip=localhost"], {}).healthz_ip == "127.0.0.1"
    assert load_settings(["--healthz-ip="], {}).healthz_ip == "0.0.0.0"
    assert load_settings(["--iptables-resync=100000"], {}).iptables_resync_s == 86400


def test_a_subnet_file_whose_name_is_no_utf8_is_named() -> None:
    """The names of sockets, chains and the lease cache are made of it."""
    with pytest.raises(ConfigError, match=r"--subnet-file .*is no UTF-8"):
        load_settings(["--subnet-file=/run/n\udcff.env"], {})
