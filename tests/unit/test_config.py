"""Flags and environment, in Go's syntax."""

import dataclasses
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from tundp.config import OPTIONS, Config, load_config, parse_bool, parse_int
from tundp.errors import ConfigError


def refusal(*arguments: str, **environment: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments, environment)
    return str(caught.value)


def test_defaults():
    assert load_config([], {}) == Config(
        etcd_endpoints=("http://127.0.0.1:4001", "http://127.0.0.1:2379"),
        etcd_prefix="/coreos.com/network",
        etcd_username="",
        etcd_password="",
        etcd_cafile="",
        etcd_certfile="",
        etcd_keyfile="",
        iface=(),
        public_ip=None,
        subnet_file=Path("/run/flannel/subnet.env"),
        subnet_lease_renew_margin=60,
        v=0,
        help=False,
        version=False,
        store="etcd",
        engine="auto",
        disable_offloads=(),
        workers=1,
        layout="shared",
        cpus=(),
        spin=50,
        loop="auto",
        source_check="count",
        tun_name="flannel%d",
        lease_ttl=86400,
        admin_socket=Path("/run/tundp/admin.sock"),
    )


def test_every_option_is_a_field_and_every_field_an_option():
    fields = {field.name for field in dataclasses.fields(Config)}
    assert {option.field for option in OPTIONS} == fields
    assert len(OPTIONS) == len(fields)


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
        (["--public-ip="], "public_ip", None, "empty is none"),
        (["--subnet-file=/a/b"], "subnet_file", Path("/a/b"), "a path"),
        (["--subnet-lease-renew-margin=1"], "subnet_lease_renew_margin", 1, "the least"),
        (["--subnet-lease-renew-margin=1439"], "subnet_lease_renew_margin", 1439, "the most"),
        (["--subnet-lease-renew-margin=0x10"], "subnet_lease_renew_margin", 16, "hex"),
        (["--store=file:/a"], "store", "file:/a", "a file store"),
        (["--engine=reference"], "engine", "reference", "a choice"),
        (["--loop=asyncio"], "loop", "asyncio", "a choice"),
        (["--source-check=enforce"], "source_check", "enforce", "a choice"),
        (["--tun-name=overlay%d"], "tun_name", "overlay%d", "a template"),
        (["--tun-name=a23456789012345"], "tun_name", "a23456789012345", "15 characters"),
        (["--tun-name=a2345678901234%d"], "tun_name", "a2345678901234%d", "15 once filled in"),
        (["--lease-ttl=1"], "lease_ttl", 1, "the least"),
        (["--admin-socket=/s"], "admin_socket", Path("/s"), "a path"),
    ],
)
def test_flags(arguments, field, value, breaks):
    assert getattr(load_config(arguments, {}), field) == value, breaks


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
def test_refused(arguments, texts, breaks):
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
def test_int_forms(text, value):
    assert parse_int(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "x", "1.5", "08", "0x", "0b2", "0o8", "--5", "+-5", "1e3", "5 ", " 5", "5\n", "\u0663",
     "0\u0663", "\xb2", "9223372036854775808", "-9223372036854775809", "9" * 5000],
)  # fmt: skip
def test_not_ints_in_go(text):
    with pytest.raises(ValueError, match=r"whole number|range"):
        parse_int(text)


@pytest.mark.parametrize("text", ["1", "t", "T", "true", "TRUE", "True"])
def test_true(text):
    assert parse_bool(text) is True


@pytest.mark.parametrize("text", ["0", "f", "F", "false", "FALSE", "False"])
def test_false(text):
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
        ("FLANNELD_SUBNET_LEASE_RENEW_MARGIN", "30", "subnet_lease_renew_margin", 30),
        ("FLANNELD_V", "2", "v", 2),
        ("FLANNELD_V", "", "v", 0),
        ("FLANNELD_VERSION", "true", "version", False),
        ("FLANNELD_VERSION", "v0.28.9", "version", False),
        ("TUNDP_STORE", "file:/a", "store", "file:/a"),
        ("TUNDP_SOURCE_CHECK", "off", "source_check", "off"),
        ("TUNDP_TUN_NAME", "t0", "tun_name", "t0"),
        ("TUNDP_LEASE_TTL", "0x20", "lease_ttl", 32),
        ("TUNDP_ADMIN_SOCKET", "/s", "admin_socket", Path("/s")),
        ("FLANNELD_STORE", "file:/a", "store", "etcd"),
        ("TUNDP_IFACE", "eth0", "iface", ()),
        ("flanneld_v", "2", "v", 0),
    ],
)
def test_environment(variable, text, field, value):
    assert getattr(load_config([], {variable: text}), field) == value


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
def test_precedence(arguments, environment, field, value, breaks):
    assert getattr(load_config(arguments, environment), field) == value, breaks


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
def test_a_bad_variable_is_named(variable, text, why):
    message = refusal(**{variable: text})
    assert message.startswith(f"{variable} '{text}'")
    assert why in message


def test_every_variable_is_flannels_or_ours():
    ours = {"disable-offloads", "workers", "layout", "cpus", "spin"}
    ours |= {"store", "engine", "loop", "source-check", "tun-name", "lease-ttl", "admin-socket"}
    for option in OPTIONS:
        prefix = "TUNDP_" if option.name in ours else "FLANNELD_"
        assert option.variable == prefix + option.name.replace("-", "_").upper()


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
def test_a_password_is_in_no_message(arguments):
    assert SECRET not in refusal(*arguments)


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["--etcd-username=u", f"--etcd-password={SECRET}"], {}),
        (["--etcd-username=u"], {"FLANNELD_ETCD_PASSWORD": SECRET}),
    ],
)
def test_a_password_is_not_described(arguments, environment):
    text = load_config(arguments, environment).describe()
    assert SECRET not in text
    assert "***" in text


def test_a_password_in_a_url_is_not_described_either():
    try:
        config = load_config([f"--etcd-endpoints=http://root:{SECRET}@192.0.2.9:2379"], {})
    except ConfigError as error:
        assert SECRET not in str(error)
    else:
        assert SECRET not in config.describe()


def test_describe_shows_what_differs():
    assert load_config([], {}).describe() == "all defaults"
    config = load_config(["--iface=a", "--iface=b", "-v=1", "--public-ip=192.0.2.1"], {})
    assert config.describe() == "iface=a,b public-ip=192.0.2.1 v=1"


@pytest.mark.parametrize(
    ("store", "path"),
    [("etcd", None), ("file:/a/b.json", Path("/a/b.json")), ("file:rel", Path("rel"))],
)
def test_store_path(store, path):
    assert load_config([f"--store={store}"], {}).store_path == path


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config([], {}).v = 3
