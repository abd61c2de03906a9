"""Flags, environment and file to one frozen Settings, with where each value came from.

    flag  over  FLANNELD_* or TUNDP_* variable  over  --config file  over  default

An empty variable is one that is not set; a bad one is an error (flannel turns it into 0), but for
what got there by accident (settings/accidents.py). The
`flanneld` script alone ignores stray arguments as flannel does, with a warning: what starts a
stock flanneld must start tundp.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tundp.errors import ConfigError
from tundp.files import SMALL_LEN, read_regular, read_stream
from tundp.instance import Instance
from tundp.settings import goflags
from tundp.settings.accidents import is_service_link, links_sentence, read_variable
from tundp.settings.declare import Flag
from tundp.settings.parsers import parse_path
from tundp.settings.settings import DEFAULT, FLAGS, SETTABLE, Settings

_FIELDS: Final = {each.name: each.field for each in FLAGS}
_PREFIXES: Final = ("FLANNELD_", "TUNDP_")


def load_settings(
    arguments: Sequence[str], environment: Mapping[str, str], *, ignores_stray: bool = False
) -> Settings:
    """The settings of `tundp run`; ConfigError names the flag, variable or file line.

    ignores_stray: see goflags.parse; what follows the flags is in `ignored`.
    """
    parsed = goflags.parse(arguments, FLAGS, ignores_stray=ignores_stray)
    return resolve(parsed.values, environment, ignored=parsed.ignored)


def resolve(
    given: Mapping[str, Any],
    environment: Mapping[str, str],
    *,
    concerned: Collection[Flag] = FLAGS,
    variables_origin: str = "",
    ignored: tuple[str, ...] = (),
) -> Settings:
    """The settings of what was `given` on the command line, and of the other sources.

    concerned: the flags that matter to the caller; the others keep their defaults, and what a
    variable or the file says of them is not read.
    variables_origin: where `environment` is from, if it is not the process's own.
    """
    texts = {
        each.name: read_variable(each, each.variable, environment.get(each.variable, "")).text
        for each in FLAGS
        if each.variable
    }
    path = given["config"] if "config" in given else parse_path(texts["config"])
    from_file = {} if path is None else _read_file(path, concerned)
    values: dict[str, Any] = {}
    origins = dict.fromkeys((each.name for each in FLAGS), DEFAULT)
    for each in concerned:
        if each.name in given:
            values[each.field] = given[each.name]
            origins[each.name] = f"--{each.name}"
        elif text := texts.get(each.name, ""):
            origin = each.variable + (f" of {variables_origin}" if variables_origin else "")
            value = goflags.convert(each, text, origin)
            values[each.field] = (value,) if each.is_repeatable else value
            origins[each.name] = origin
        elif each.name in from_file:
            values[each.field] = from_file[each.name]
            origins[each.name] = str(path)
    return _complete(values, origins, ignored)


def resolve_reported(
    reported: Mapping[str, str], origins: Mapping[str, str], given: Mapping[str, Any], whose: str
) -> Settings:
    """The settings a running daemon reported, with what was `given` over them.

    reported: as settings.show.reported has them, secrets filled in. whose: for errors.
    """
    known = {each.name: each for each in SETTABLE}
    values = {}
    for name, text in reported.items():
        # A daemon of another version may have flags this program does not know.
        if flag := known.get(name):
            origin = f"{whose}: {name}"
            values[flag.field] = (
                tuple(goflags.convert(flag, str(item), origin) for item in json.loads(text))
                if flag.is_repeatable
                else goflags.convert(flag, text, origin)
            )
    told = dict.fromkeys((each.name for each in FLAGS), DEFAULT)
    told |= {name: origin for name, origin in origins.items() if name in known}
    for each in SETTABLE:
        if each.name in given:
            values[each.field] = given[each.name]
            told[each.name] = f"--{each.name}"
    return _complete(values, told, ())


def _complete(
    values: dict[str, Any], origins: Mapping[str, str], ignored: tuple[str, ...]
) -> Settings:
    if values.get("admin_socket") is None:
        subnet_file = values.get("subnet_file", Instance().subnet_file)
        values["admin_socket"] = Instance(subnet_file).admin_socket
    settings = Settings(**values, origins=origins, ignored=ignored)
    if not (settings.help or settings.version):
        _check(settings)
    return settings


def variable_warnings(environment: Mapping[str, str]) -> list[str]:
    """What is odd about the `FLANNELD_*` and `TUNDP_*` variables, a sentence each."""
    readings = [
        read_variable(each, each.variable, environment.get(each.variable, ""))
        for each in FLAGS
        if each.variable
    ]
    unknown = [
        f"variable {name} is set, but tundp does not know it"
        for name in unknown_variables(environment)
    ]
    sentences = [*(each.accident for each in readings), links_sentence(environment, _PREFIXES)]
    return [*filter(None, sentences), *unknown]


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """`FLANNELD_*` and `TUNDP_*` variables that are set and mean nothing here.

    Kubernetes' service links are left out.
    """
    # FLANNELD_VERSION is set by images, and has no effect in flannel either.
    known = {each.variable for each in FLAGS} | {"FLANNELD_VERSION", "FLANNELD_HELP"}
    return sorted(
        name
        for name, text in environment.items()
        if text
        and name.startswith(_PREFIXES)
        and name not in known
        and not is_service_link(name, text)
    )


def read_environment_file(path: Path) -> dict[str, str]:
    """The assignments of a systemd EnvironmentFile=, such as /etc/default/tundp.

    systemd.exec(5): lines NAME=value, # and ; begin comments, a backslash at the end of a line
    joins it with the next, one pair of quotes around a value is removed. ConfigError if the
    file cannot be read.
    """
    try:
        text = _read_settings(path, is_strict=False)
    except OSError as error:
        raise ConfigError(f"--env-file {path}: {error.strerror}") from None
    found = {}
    for line in text.replace("\\\n", "").splitlines():
        name, equals, value = line.strip().partition("=")
        value = value.strip()
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        if equals and not name.startswith(("#", ";")):
            found[name.strip()] = value
    return found


def read_again(settings: Settings, names: Collection[str]) -> dict[str, Any] | None:
    """Settings of these flag names as their --config file has them now.

    Those that came from elsewhere are as they were. None if none is the file's, or if it is a
    pipe, which cannot be read again. ConfigError if the file cannot be used.
    """
    path = settings.config
    if path is None or _is_stream(path):
        return None
    concerned = [
        each
        for each in FLAGS
        if each.name in names and settings.origins.get(each.name) == str(path)
    ]
    if not concerned:
        return None
    return {each: getattr(settings, _FIELDS[each]) for each in names} | _read_file(path, concerned)


def _read_file(path: Path, concerned: Iterable[Flag]) -> dict[str, Any]:
    """The settings of a TOML file: keys are flag names, lists may be lists."""
    try:
        document = tomllib.loads(_read_settings(path))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, not a path
        raise ConfigError(f"--config {str(path)!r} is not TOML: {error}") from None
    known = {each.name: each for each in SETTABLE}
    wanted = {each.name for each in concerned}
    values = {}
    for name, raw in document.items():
        flag = known.get(name)
        if flag is None:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else "keys are named as the flags are"
            raise ConfigError(f"{path}: unknown key {name}: {hint}")
        if name in wanted:
            values[name] = _from_toml(flag, raw, f"{path}: {name}")
    return values


def _read_settings(path: Path, *, is_strict: bool = True) -> str:
    """The text of a settings file; of /dev/stdin or a shell's <(...) until its end.

    is_strict: ValueError for what is not UTF-8.
    """
    if _is_stream(path):
        return read_stream(path).decode("utf-8-sig", "strict" if is_strict else "replace")
    return read_regular(path, most_len=SMALL_LEN, is_strict=is_strict)


def _is_stream(path: Path) -> bool:
    """Whether a path is one of a descriptor, which may be a pipe and is read only once."""
    return str(path).startswith(("/dev/", "/proc/"))


def _from_toml(flag: Flag, raw: Any, origin: str) -> Any:
    """The value of a TOML or JSON value; ConfigError names `origin`."""
    if isinstance(raw, list) and not isinstance(flag.default, tuple):
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
        if isinstance(item, bool) is not flag.is_boolean and not isinstance(item, str):
            wanted = "true or false" if flag.is_boolean else "not true or false"
            raise ConfigError(f"{origin} is {texts[-1]}, but must be {wanted}")
    if flag.is_repeatable:
        return tuple(goflags.convert(flag, text, origin) for text in texts)
    return goflags.convert(flag, ",".join(texts), origin)


def _check(settings: Settings) -> None:
    """What several settings say together."""
    if bool(settings.etcd_certfile) != bool(settings.etcd_keyfile):
        missing = "--etcd-keyfile" if settings.etcd_certfile else "--etcd-certfile"
        raise ConfigError(f"{missing} is missing: a client certificate needs both files")
    if bool(settings.etcd_username) != bool(settings.etcd_password):
        missing = "--etcd-password" if settings.etcd_username else "--etcd-username"
        raise ConfigError(f"{missing} is missing: etcd's auth needs both")
    if not settings.etcd_endpoints:
        raise ConfigError("--etcd-endpoints is empty: give at least one URL")
    for flag in FLAGS:
        if flag.name in _REFUSED and getattr(settings, flag.field):
            raise ConfigError(
                f"--{flag.name}: leases from Kubernetes are not yet in tundp; use etcd"
                " (--etcd-endpoints), or --store=file:PATH"
            )


_REFUSED: Final = frozenset({"kube-subnet-mgr", "kube-api-url", "kubeconfig-file"})
