"""Any list of arguments and any environment: a Settings or a ConfigError, nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tundp.choices import Offload
from tundp.errors import ConfigError
from tundp.settings.declare import Flag
from tundp.settings.parsers import parse_int
from tundp.settings.settings import FLAGS as DECLARED
from tundp.settings.settings import Settings
from tundp.settings.show import reported, toml_lines
from tundp.settings.sources import load_settings, resolve_reported

SETTINGS = settings(max_examples=200, deadline=None)
NAMES = st.sampled_from([option.name for option in DECLARED])
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["1", "0", "017", "0x1f", "true", "192.0.2.1", "file:/x", "off", "auto", ","]),
)
FLAGS = st.builds(
    lambda dashes, name, equals, text: f"{dashes}{name}{equals}{text}",
    st.sampled_from(["-", "--", "", "---"]),
    NAMES | st.text(max_size=6),
    st.sampled_from(["", "=", "=="]),
    st.just("") | TEXTS,
)
GOOD = st.builds("--{}={}".format, NAMES, TEXTS)


@SETTINGS
@given(
    st.lists(st.one_of(FLAGS, GOOD, TEXTS), max_size=6),
    st.dictionaries(
        st.sampled_from([option.variable for option in DECLARED if option.variable]),
        TEXTS,
        max_size=3,
    ),
)
@example([f"--v={'9' * 5000}"], {})
@example(["--public-ip=\x00", "--tun-name=\x00"], {})
def test_load_config_raises_nothing_but_config_errors(
    arguments: list[str], environment: dict[str, str]
) -> None:
    try:
        config = load_settings(arguments, environment)
    except ConfigError as error:
        assert str(error)
        return
    assert isinstance(config, Settings)
    assert 1 <= config.subnet_lease_renew_margin_min <= 1439
    assert config.lease_ttl_s >= 1
    assert config.etcd_endpoints
    assert config.describe()


@SETTINGS
@given(st.text(st.characters(codec="ascii", exclude_characters=","), min_size=12, max_size=20))
def test_a_long_password_never_shows(secret: str) -> None:
    secret = f"s3cr3t{secret}"
    arguments = ["--etcd-username=u", "--etcd-password", secret]
    assert secret not in load_settings(arguments, {}).describe()
    try:
        load_settings([*arguments, "--v=x"], {})
    except ConfigError as error:
        assert secret not in str(error)
    else:
        raise AssertionError("--v=x was taken")


@SETTINGS
@given(st.integers(-(2**63), 2**63 - 1))
def test_every_form_of_an_int_is_read(number: int) -> None:
    sign, digits = ("-", -number) if number < 0 else ("", number)
    for text in (f"{number}", f"{number:#x}", f"{number:#o}", f"{number:#b}", f"{sign}0{digits:o}"):
        assert parse_int(text) == number


# What `tundp config show` prints is a file that says the same.

# Quotes, backslashes, tabs, comment signs and accents.
WORDS = st.text(
    st.characters(min_codepoint=0x20, max_codepoint=0x7E)
    | st.sampled_from("\t\n\r\x1f\x7fé€\u2028"),
    max_size=12,
)
ADDRESSES = st.ip_addresses(v=4).filter(
    lambda ip: 1 <= int(ip) >> 24 < 224 and int(ip) >> 24 != 127
)
BOOLEANS = st.booleans().map(lambda value: "true" if value else "false")
PATHS = WORDS.map(lambda text: f"/{text}".rstrip("."))


def networks(length: int) -> st.SearchStrategy[str]:
    return st.ip_addresses(v=4).map(lambda ip: str(IPv4Network((ip, length), strict=False)))


VALUES: dict[str, st.SearchStrategy[str]] = {
    "etcd-endpoints": st.lists(
        WORDS.map(lambda text: "http://" + text.replace("@", "").replace(",", "")).map(str.strip),
        min_size=1,
        max_size=3,
    ).map(",".join),
    "iface-can-reach": st.just("") | ADDRESSES.map(str),
    "public-ip": st.just("") | ADDRESSES.map(str),
    "public-ipv6": st.just("") | st.ip_addresses(v=6).map(str),
    "subnet-file": PATHS,
    "subnet-lease-renew-margin": st.integers(1, 1439).map(hex),
    "iptables-resync": st.integers(1, 86400).map(str),
    "healthz-ip": st.ip_addresses().map(str),
    "healthz-port": st.integers(0, 65535).map(oct),
    "net-config-path": PATHS,
    "v": st.integers(-(2**63), 2**63 - 1).map(str),
    "state-dir": st.just("") | PATHS,
    "metrics-addr": st.just("")
    | st.builds("{}:{}".format, st.ip_addresses(v=4), st.integers(1, 65535))
    | st.integers(1, 65535).map(":{}".format),
    "store": st.just("etcd") | WORDS.filter(bool).map("file:{}".format),
    "disable-offloads": st.lists(st.sampled_from([each.value for each in Offload]), max_size=3).map(
        ",".join
    ),
    "source-admit": st.lists(st.integers(0, 32).flatmap(networks), max_size=16).map(",".join),
    "workers": st.integers(1, 64).map(str),
    "cpus": st.lists(st.sampled_from(sorted(os.sched_getaffinity(0))), max_size=3).map(
        lambda numbers: ",".join(map(str, numbers))
    ),
    "spin": st.integers(0, 1000).map(str),
    "tun-name": st.from_regex(r"[A-Za-z0-9_-]{1,8}(%d)?", fullmatch=True),
    "lease-ttl": st.integers(1, 2**40).map(str),
    "admin-socket": PATHS,
}
TOGETHER = ("etcd-username", "etcd-password", "etcd-certfile", "etcd-keyfile")
KUBERNETES = ("kube-subnet-mgr", "kube-api-url", "kubeconfig-file")
SETTABLE = [
    option
    for option in DECLARED
    if option.name not in ("help", "version", "config", *TOGETHER, *KUBERNETES)
]


def texts_of(flag: Flag) -> st.SearchStrategy[str]:
    """What can be given for a flag with no more rules than its declaration tells."""
    if flag.choices:
        return st.sampled_from(flag.choices)
    if flag.is_boolean:
        return BOOLEANS
    return st.integers(1, 64).map(str) if isinstance(flag.default, int) else WORDS


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    arguments = []
    for option in draw(st.lists(st.sampled_from(SETTABLE), unique=True, max_size=8)):
        texts = VALUES[option.name] if option.name in VALUES else texts_of(option)
        for _ in range(draw(st.integers(1, 3)) if option.is_repeatable else 1):
            arguments += [f"--{option.name}={draw(texts)}"]
    for one, other in (("etcd-username", "etcd-password"), ("etcd-certfile", "etcd-keyfile")):
        if draw(st.booleans()):
            arguments += [f"--{name}=x{draw(WORDS)}" for name in (one, other)]
    return arguments


def shown(config: Settings, *, with_origin: bool) -> str:
    return "\n".join(toml_lines(config, with_origin=with_origin))


def read_back(text: str) -> Settings:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "t.toml")
        path.write_text(text, encoding="utf-8")
        return load_settings([f"--config={path}"], {})


@settings(SETTINGS, max_examples=120)
@given(command_lines(), st.booleans())
@example(["--metrics-addr=:1", "--cpus=0", "--state-dir="], False)
def test_what_is_shown_can_be_read_back(arguments: list[str], with_origin: bool) -> None:
    config = load_settings(arguments, {})
    again = read_back(shown(config, with_origin=with_origin))
    # The password is not shown, and this one was read from a file.
    password = "***" if config.etcd_password else ""
    assert again == dataclasses.replace(config, etcd_password=password, config=again.config)


@settings(SETTINGS, max_examples=120)
@given(command_lines())
def test_what_a_daemon_reports_can_be_read_back(arguments: list[str]) -> None:
    config = load_settings(arguments, {})
    again = resolve_reported(reported(config), config.origins, {}, "daemon")
    password = "***" if config.etcd_password else ""
    assert again == dataclasses.replace(config, etcd_password=password, config=again.config)
    assert again.origins == config.origins


def test_an_ipv6_address_to_listen_on_shown_can_be_read_back() -> None:
    config = load_settings(["--metrics-addr=[::1]:9285"], {})
    assert read_back(shown(config, with_origin=False)).metrics_addr == ("::1", 9285)


def test_text_beyond_16_bits_shown_can_be_read_back() -> None:
    config = load_settings(["--etcd-prefix=/\U0001f600"], {})
    assert read_back(shown(config, with_origin=False)).etcd_prefix == "/\U0001f600"


@SETTINGS
@given(st.text(max_size=60))
def test_any_file_is_settings_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(read_back(text), Settings)


@settings(SETTINGS, max_examples=120)
@given(
    st.dictionaries(
        st.sampled_from([option.name for option in DECLARED]),
        st.recursive(
            st.booleans().map(lambda value: str(value).lower())
            | st.integers(-100, 100000).map(str)
            | st.sampled_from(["1.5", "nan", '""', '"x"', '"1"', '"true"', "{}", "07:32:00"]),
            lambda inner: st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]"),
            max_leaves=4,
        ),
        max_size=4,
    )
)
def test_any_values_in_a_file_are_settings_or_a_config_error_naming_one(
    document: dict[str, Any],
) -> None:
    text = "".join(f"{name} = {value}\n" for name, value in document.items())
    try:
        config = read_back(text)
    except ConfigError as error:
        named = {*document, *TOGETHER, "etcd-endpoints"}
        assert any(name in str(error) for name in named)
    else:
        assert {name for name, origin in config.origins.items() if origin != "default"} == {
            *document,
            "config",
        }
