"""Flags, environment and file to one frozen Settings. Every default and every check lives here.

    flag  over  FLANNELD_* or TUNDP_* variable  over  --config file  over  default

Flags are read as Go's flag package reads them, because flannel's users write them so:
`-f v`, `-f=v` and the same with two dashes are equal, and a boolean takes its value
only with `=`. Where this differs on purpose: an unknown flag or a stray argument is an
error (flannel exits with 0, or ignores the rest), and so is a bad environment variable
(flannel turns it into 0). The `flanneld` script alone ignores stray arguments as flannel
does, with a warning: what starts a stock flanneld must start us.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Final

from tundp.errors import ConfigError
from tundp.settings.options import (
    ADMIN_SOCKET,
    FILE_STORE,
    OPTIONS,
    RUN_DIRECTORY,
    SUBNET_FILE,
    Option,
    parse_path,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One daemon's settings, checked. Field names are the flags' with underscores."""

    etcd_endpoints: tuple[str, ...]
    etcd_prefix: str
    etcd_username: str
    etcd_password: str = field(repr=False)
    etcd_cafile: str
    etcd_certfile: str
    etcd_keyfile: str
    iface: tuple[str, ...]
    iface_regex: tuple[str, ...]
    iface_can_reach: IPv4Address | None
    public_ip: IPv4Address | None
    public_ipv6: IPv6Address | None
    subnet_file: Path
    subnet_lease_renew_margin: int
    ip_masq: bool
    ip_masq_fully_random_disable: bool
    iptables_resync: int
    iptables_forward_rules: bool
    ip_blackhole_route: bool
    healthz_ip: str
    healthz_port: int
    kube_subnet_mgr: bool
    kube_api_url: str
    kubeconfig_file: str
    kube_annotation_prefix: str
    net_config_path: Path
    set_node_network_unavailable: bool
    v: int
    vmodule: str
    log_backtrace_at: str
    help: bool
    version: bool
    config: Path | None
    etcd_api: str
    on_lease_lost: str
    force_takeover: bool
    state_dir: Path | None
    fallback_route: bool
    metrics_addr: tuple[str, int] | None
    store: str
    engine: str
    disable_offloads: tuple[str, ...]
    workers: int
    layout: str
    cpus: tuple[int, ...]
    spin: int
    loop: str
    source_check: str
    tun_name: str
    lease_ttl: int
    admin_socket: Path
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Flag name to where its value came from: `--x`, a variable, a file, or `default`."""
    ignored: tuple[str, ...] = field(default=(), compare=False)
    """Stray arguments, if they were to be ignored."""

    @property
    def instance(self) -> str:
        """Tells several daemons of one host apart, as flannel does, by subnet file; "" usually."""
        return "" if self.subnet_file == SUBNET_FILE else _slug(self.subnet_file)

    @property
    def store_path(self) -> Path | None:
        """The lease file of a file store, None for etcd."""
        if not self.store.startswith(FILE_STORE):
            return None
        return Path(self.store.removeprefix(FILE_STORE))

    def describe(self) -> str:
        """The settings that were given, passwords blanked, for the log."""
        shown = [
            f"{option.name}={self.show(option)}"
            for option in OPTIONS
            if self.origins.get(option.name, DEFAULT) != DEFAULT
        ]
        return " ".join(shown) or "all defaults"

    def show(self, option: Option) -> str:
        """One setting as a person would write it, a password blanked."""
        value = getattr(self, option.field)
        if option.is_secret:
            return "***" if value else ""
        return _show(value)


DEFAULT: Final = "default"
NOT_IN_FILE: Final = frozenset({"help", "version", "config"})
_NO_VARIABLE: Final = frozenset({"help", "version"})
"""FLANNELD_VERSION has no effect in flannel either: images set it."""


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """`FLANNELD_*` and `TUNDP_*` variables that are set and mean nothing here."""
    known = {option.variable for option in OPTIONS}
    return sorted(
        name
        for name, text in environment.items()
        if text and name.startswith(("FLANNELD_", "TUNDP_")) and name not in known
    )


def load_settings(
    arguments: Sequence[str], environment: Mapping[str, str], *, ignores_stray: bool = False
) -> Settings:
    """The settings in force; ConfigError names the flag, variable or file line.

    ignores_stray: the first argument that is no flag ends the flags, as in flannel, and
    what follows is in `ignored`; else it is an error.
    """
    given, ignored = _parse_arguments(arguments, OPTIONS, ignores_stray=ignores_stray)
    texts = {
        option.name: environment.get(option.variable, "")
        for option in OPTIONS
        if option.name not in _NO_VARIABLE
    }
    path = given.get("config") or parse_path(texts["config"])
    from_file = {} if path is None else _read_file(path)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for option in OPTIONS:
        if option.name in given:
            values[option.field] = given[option.name]
            origins[option.name] = f"--{option.name}"
        elif text := texts.get(option.name, ""):
            value = _convert(option, text, option.variable)
            values[option.field] = (value,) if option.is_repeatable else value
            origins[option.name] = option.variable
        elif option.name in from_file:
            values[option.field] = from_file[option.name]
            origins[option.name] = str(path)
        else:
            values[option.field] = option.default
            origins[option.name] = DEFAULT
    subnet_file: Path = values["subnet_file"]
    settings = Settings(
        **values | {"admin_socket": values["admin_socket"] or admin_socket_of(subnet_file)},
        origins=origins,
        ignored=ignored,
    )
    if not (settings.help or settings.version):
        _check(settings)
    return settings


def admin_socket_of(subnet_file: Path) -> Path:
    """The default: daemons that differ in --subnet-file, and nothing else, must not collide."""
    if subnet_file == SUBNET_FILE:
        return ADMIN_SOCKET
    # A socket's path has 107 bytes (sockaddr_un); the end of the name tells most.
    return RUN_DIRECTORY / f"{_slug(subnet_file)[-80:]}.sock"


def _slug(path: Path) -> str:
    return str(path.absolute()).strip("/").replace("-", "--").replace("/", "-")


def _read_file(path: Path) -> dict[str, Any]:
    """The settings of a TOML file: keys are flag names, lists may be lists."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, not a path
        raise ConfigError(f"--config {str(path)!r} is not TOML: {error}") from None
    by_name = {option.name: option for option in OPTIONS if option.name not in NOT_IN_FILE}
    values = {}
    for name, raw in document.items():
        option = by_name.get(name)
        if option is None:
            close = difflib.get_close_matches(name, by_name, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else "keys are named as the flags are"
            raise ConfigError(f"{path}: unknown key {name}: {hint}")
        values[name] = _from_toml(option, raw, f"{path}: {name}")
    return values


def _from_toml(option: Option, raw: Any, origin: str) -> Any:
    if isinstance(raw, list) and not isinstance(option.default, tuple):
        raise ConfigError(f"{origin} is a list, but takes one value")
    items = raw if isinstance(raw, list) else [raw]
    texts = []
    for item in items:
        if isinstance(item, bool):
            texts.append("true" if item else "false")
        elif isinstance(item, (str, int)):
            texts.append(str(item))
        else:
            raise ConfigError(f"{origin} is neither text, number, true, false nor a list of them")
        if isinstance(item, bool) is not option.is_boolean and not isinstance(item, str):
            wanted = "true or false" if option.is_boolean else "not true or false"
            raise ConfigError(f"{origin} is {texts[-1]}, but must be {wanted}")
    if option.is_repeatable:
        return tuple(_convert(option, text, origin) for text in texts)
    return _convert(option, ",".join(texts), origin)


def _check(settings: Settings) -> None:
    if bool(settings.etcd_certfile) != bool(settings.etcd_keyfile):
        missing = "--etcd-keyfile" if settings.etcd_certfile else "--etcd-certfile"
        raise ConfigError(f"{missing} is missing: a client certificate needs both files")
    if bool(settings.etcd_username) != bool(settings.etcd_password):
        missing = "--etcd-password" if settings.etcd_username else "--etcd-username"
        raise ConfigError(f"{missing} is missing: etcd's auth needs both")
    if not settings.etcd_endpoints:
        raise ConfigError("--etcd-endpoints is empty: give at least one URL")
    for name in ("kube-subnet-mgr", "kube-api-url", "kubeconfig-file"):
        if getattr(settings, name.replace("-", "_")):
            raise ConfigError(
                f"--{name}: leases from Kubernetes are not yet in tundp; use etcd"
                " (--etcd-endpoints), or --store=file:PATH"
            )


def _parse_arguments(
    arguments: Sequence[str], options: Sequence[Option], *, ignores_stray: bool
) -> tuple[dict[str, Any], tuple[str, ...]]:
    by_name = {option.name: option for option in options}
    values: dict[str, Any] = {}
    queue = list(arguments)
    while queue:
        flag = queue.pop(0)
        if ignores_stray and (flag in ("-", "--") or not flag.startswith("-")):
            rest = queue if flag == "--" else [flag, *queue]
            return values, tuple(rest)
        if flag == "--":
            if queue:
                raise ConfigError(
                    f"unexpected argument {queue[0]!r} after --: only flags are taken"
                )
            break
        name, text = _split(flag)
        option = by_name.get(name)
        if option is None:
            raise ConfigError(_unknown(flag, name, by_name))
        if text is None:
            if option.is_boolean:
                text = "true"
            elif queue:
                text = queue.pop(0)
            else:
                raise ConfigError(f"flag needs an argument: --{name} {option.metavar}")
        value = _convert(option, text, f"--{name}")
        values[name] = (*values.get(name, ()), value) if option.is_repeatable else value
    return values, ()


def _split(flag: str) -> tuple[str, str | None]:
    """The flag's name and the text after `=`, as Go splits them."""
    if not flag.startswith("-") or flag == "-":
        raise ConfigError(
            f"unexpected argument {flag!r}: only flags are taken; did a flag before it"
            " lose its value, or a boolean want `=`?"
        )
    body = flag[2:] if flag.startswith("--") else flag[1:]
    name, equals, text = body.partition("=")
    if not name or name.startswith("-"):
        raise ConfigError(f"bad flag syntax: {flag.partition('=')[0]}")
    return "help" if name == "h" else name, text if equals else None


_GONE: Final = frozenset(
    {"listen", "remote", "remote-keyfile", "remote-certfile", "remote-cafile", "networks"}
)


def _unknown(flag: str, name: str, known: Mapping[str, Option]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean --{close[0]}?" if close else "tundp run --help lists them"
    if name in _GONE:
        hint = "flannel's client/server mode is gone since v0.8; run one daemon for each network"
    return f"unknown flag {flag.partition('=')[0]}: {hint}"


def _convert(option: Option, text: str, origin: str) -> Any:
    try:
        return option.parse(text)
    except ValueError as error:
        shown = "***" if option.is_secret or "@" in text else repr(text)
        raise ConfigError(f"{origin} {shown} {error}") from None


def _show(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], int):
        # An address to listen on; a list of CPUs has no text in it.
        if not isinstance(value[0], str):
            return _join(value)
        host = f"[{value[0]}]" if ":" in value[0] else value[0]
        return f"{host}:{value[1]}"
    return _join(value) if isinstance(value, tuple) else str(value)


def _join(values: tuple[Any, ...]) -> str:
    return ",".join(str(item) for item in values)
