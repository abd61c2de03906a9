"""Command lines in the syntax of Go's flag package, which flannel's users write.

`-f v`, `-f=v` and the same with two dashes are equal; a boolean takes its value only with `=`;
the next word is the value, whether it begins with a dash or not; `--` ends the flags. Where
this differs on purpose: an unknown flag or a stray argument is an error (flannel exits with 0,
or ignores the rest), and flags may also stand behind operands, as with GNU programs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tundp.errors import ConfigError
from tundp.settings.declare import Flag

_ALIASES: Final = {"h": "help"}
_GONE: Final = frozenset(
    {"listen", "remote", "remote-keyfile", "remote-certfile", "remote-cafile", "networks"}
)
"""Flags of flannel's client/server mode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """A command line, read."""

    values: Mapping[str, Any] = field(default_factory=dict)
    """Flag name to value, of the flags that were given."""
    operands: tuple[str, ...] = ()
    """What is neither a flag nor a flag's value."""
    ignored: tuple[str, ...] = ()
    """From the first stray argument on, if these were to be ignored."""


def parse(
    arguments: Sequence[str],
    flags: Iterable[Flag],
    *,
    operand_count: int | None = 0,
    ignores_stray: bool = False,
    command: str = "tundp run",
) -> Parsed:
    """Read `arguments`; ConfigError names the flag or argument that is wrong.

    operand_count: how many operands may be given; None for any number.
    ignores_stray: the first argument that is no flag ends the flags, as in flannel.
    command: whose --help an error points to.
    """
    by_name = {each.name: each for each in flags}
    values: dict[str, Any] = {}
    operands: list[str] = []
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        if ignores_stray and (word in ("-", "--") or not word.startswith("-")):
            rest = queue if word == "--" else [word, *queue]
            return Parsed(values=values, ignored=tuple(rest))
        if word == "--":
            operands += queue
            if operand_count is not None and len(operands) > operand_count:
                raise ConfigError(
                    f"unexpected argument {operands[operand_count]!r} after --: only flags are"
                    " taken"
                )
            break
        has_room = operand_count is None or len(operands) < operand_count
        if has_room and not word.startswith("-"):
            operands.append(word)
            continue
        name, text = _split(word)
        flag = by_name.get(name)
        if flag is None:
            raise ConfigError(_unknown(word, name, by_name, command))
        if text is None:
            if flag.is_boolean:
                text = "true"
            elif queue:
                text = queue.pop(0)
            else:
                raise ConfigError(f"flag needs an argument: --{name} {flag.metavar}")
        value = convert(flag, text, f"--{name}")
        values[name] = (*values.get(name, ()), value) if flag.is_repeatable else value
    return Parsed(values=values, operands=tuple(operands))


def convert(flag: Flag, text: str, origin: str) -> Any:
    """The value of `text`; ConfigError names `origin`, and the text unless it may be secret."""
    try:
        return flag.parse(text)
    except ValueError as error:
        shown = "***" if flag.is_secret or "@" in text else repr(text)
        raise ConfigError(f"{origin} {shown} {error}") from None


def _split(word: str) -> tuple[str, str | None]:
    """The flag's name and the text after `=`, as Go splits them."""
    if not word.startswith("-") or word == "-":
        raise ConfigError(
            f"unexpected argument {word!r}: only flags are taken; did a flag before it"
            " lose its value, or a boolean want `=`?"
        )
    body = word[2:] if word.startswith("--") else word[1:]
    name, equals, text = body.partition("=")
    if not name or name.startswith("-"):
        raise ConfigError(f"bad flag syntax: {word.partition('=')[0]}")
    return _ALIASES.get(name, name), text if equals else None


def _unknown(word: str, name: str, known: Mapping[str, Flag], command: str) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean --{close[0]}?" if close else f"{command} --help lists them"
    if name in _GONE:
        hint = "flannel's client/server mode is gone since v0.8; run one daemon for each network"
    return f"unknown flag {word.partition('=')[0]}: {hint}"
