"""subnet.env as options of dockerd, compatible with flannel's mk-docker-opts.sh.

    FLANNEL_SUBNET  --bip=      the bridge's address
    FLANNEL_MTU     --mtu=
    FLANNEL_IPMASQ  --ip-masq=  the opposite: flannel or Docker masquerades, not both

Differences from the script on purpose: values are escaped for the shell and systemd that read
the file, and the file is replaced in one step. Its command line is read by cli/docker_opts.py.
"""

from __future__ import annotations

import errno
import logging
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path
from typing import Final

from tundp.errors import ConfigError, PlatformError
from tundp.files import SMALL_LEN, read_regular, write_atomically
from tundp.instance import SUBNET_FILE
from tundp.linux.netlink import Netlink, Route

_log = logging.getLogger(__name__)

_OPTION_PREFIX: Final = "DOCKER_OPT_"
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_ASSIGNMENT: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.ASCII | re.DOTALL)
_NEEDS_ESCAPE: Final = re.compile(r'(["\\`$])')


@dataclass(frozen=True, slots=True, kw_only=True)
class DockerOptsSettings:
    """What to write, and where."""

    subnet_file: Path = SUBNET_FILE
    docker_file: Path = Path("/run/docker_opts.env")
    is_individual: bool = False
    is_combined: bool = False
    has_ip_masq: bool = True
    key: str = "DOCKER_OPTS"


async def write(settings: DockerOptsSettings, environment: Mapping[str, str]) -> None:
    """Write the file, then look whether a route has the subnet already.

    ConfigError for a value that cannot be used, with nothing written, and for such a
    route, with the file written, as mk-docker-opts.sh does. PlatformError if a file
    cannot be read or written.
    """
    env_file_text = _read(settings.subnet_file)
    if not settings.subnet_file.exists() and "FLANNEL_SUBNET" not in environment:
        _log.warning(
            "%s does not exist: nothing tells Docker its subnet (is the daemon ready?)",
            settings.subnet_file,
        )
    text = render(
        environment,
        env_file_text,
        is_individual=settings.is_individual,
        is_combined=settings.is_combined,
        has_ip_masq=settings.has_ip_masq,
        key=settings.key,
    )
    _write(settings.docker_file, text)
    subnet = _subnet(_variables(environment, env_file_text))
    if subnet is None:
        return
    async with Netlink() as netlink:
        check_routes(subnet, await netlink.routes())


def render(
    environment: Mapping[str, str],
    env_file_text: str,
    *,
    is_individual: bool,
    is_combined: bool,
    has_ip_masq: bool,
    key: str,
) -> str:
    """The file's text. ConfigError names a FLANNEL_IPMASQ or a line that makes no sense.

    `env_file_text` wins over `environment`; both may hold DOCKER_OPT_* variables, which
    are taken along, and a value of `key`, which goes in front. Neither or both of
    is_individual and is_combined means both kinds of lines.
    """
    variables = _variables(environment, env_file_text)
    options = {
        name: value
        for name, value in variables.items()
        if name.startswith(_OPTION_PREFIX) and _NAME.fullmatch(name)
    }
    if subnet := variables.get("FLANNEL_SUBNET"):
        options["DOCKER_OPT_BIP"] = f"--bip={subnet}"
    if mtu := variables.get("FLANNEL_MTU"):
        options["DOCKER_OPT_MTU"] = f"--mtu={mtu}"
    ip_masq = variables.get("FLANNEL_IPMASQ")
    if ip_masq and has_ip_masq:
        options["DOCKER_OPT_IPMASQ"] = f"--ip-masq={_opposite(ip_masq)}"
    in_order = sorted(options.items())
    lines = []
    if is_individual or not is_combined:
        lines += [_assign(name, value) for name, value in in_order]
    if is_combined or not is_individual:
        # The script's spaces, one too many with a preset value, are what others compare with.
        preset = variables.get(key, "")
        combined = "".join(f" {value}" for _, value in in_order)
        lines.append(_assign(key, f"{preset} {combined}" if preset else combined))
    return "".join(lines)


def check_routes(subnet: IPv4Network, routes: Iterable[Route]) -> None:
    """ConfigError if a gateway has `subnet`: Docker's bridge would take it over, or refuse."""
    for route in routes:
        if route.destination == subnet and route.gateway is not None:
            raise ConfigError(
                f"Your routing table already contains the subnet: {subnet} via {route.gateway};"
                f" if it is stale, remove it (ip route del {subnet} via {route.gateway})"
            )


def _variables(environment: Mapping[str, str], text: str) -> dict[str, str]:
    """The environment, and over it the assignments a shell would make; other words are none."""
    found = dict(environment)
    for number, line in enumerate(text.splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ConfigError(
                f"line {number} of the subnet file cannot be read: {line!r} ({error})"
            ) from None
        for word in words:
            if match := _ASSIGNMENT.fullmatch(word):
                found[match[1]] = match[2]
    return found


def _opposite(ip_masq: str) -> str:
    try:
        return {"true": "false", "false": "true"}[ip_masq]
    except KeyError:
        raise ConfigError(
            f"Invalid value of FLANNEL_IPMASQ: {ip_masq} (it is true or false)"
        ) from None


def _assign(name: str, value: str) -> str:
    escaped = _NEEDS_ESCAPE.sub(r"\\\1", value)
    return f'{name}="{escaped}"\n'


def _subnet(variables: Mapping[str, str]) -> IPv4Network | None:
    value = variables.get("FLANNEL_SUBNET", "")
    if not value:
        return None
    try:
        return IPv4Interface(value).network
    except ValueError:
        # Docker will say so too; the script writes it all the same.
        _log.warning("FLANNEL_SUBNET %s is no IPv4 address with a prefix length", value)
        return None


def _read(path: Path) -> str:
    """The text; none if there is no such file, since the environment may say it all."""
    try:
        return read_regular(path, most_len=SMALL_LEN)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.EINVAL):
            # The script passes over what is no file, too.
            _log.warning("%s: %s; only the environment counts", path, error.strerror)
            return ""
        raise PlatformError(
            f"cannot read {path}: {error.strerror}; name another file with -f", error.errno
        ) from None


def _write(path: Path, text: str) -> None:
    try:
        if path.exists() and not path.is_file():
            # A terminal, a pipe, /dev/stdout: never replaced by a file of that name.
            with path.open("w", encoding="utf-8") as stream:
                stream.write(text)
        else:
            write_atomically(path, text, follows_link=True)
    except OSError as error:
        raise PlatformError(
            f"cannot write {path}: {error.strerror}; name another file with -d", error.errno
        ) from None
