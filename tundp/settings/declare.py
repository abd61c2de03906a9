"""One declaration a flag, from which everything else about it follows.

A dataclass whose fields are made by `flag` is a set of command line options:

    spin_us: int = flag("spin", parse=parse_spin, default=50, unit="microseconds", help="...")

From that one line follow the attribute and its type, reading the command line
(settings/goflags.py), environment variable and configuration file (settings/sources.py),
`config show` and `config example` (settings/show.py), `--help` (settings/help.py), and the man
pages, shell completion, docs/reference.md and systemd/tundp-default (`python -m tundp.cli.docs`).
Adding a flag is one edit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, TypeVar

T = TypeVar("T")

_FLANNELS_PREFIX: Final = "FLANNELD_"
_OWN_PREFIX: Final = "TUNDP_"
_METADATA: Final = "flag"


class Section(Enum):
    """The headings flags are listed under, in the order of reference and example files."""

    LEASES = "Where the leases are"
    ADDRESS = "Which address the other nodes send to"
    NODE = "What this node writes and keeps"
    FIREWALL = "Firewall rules and routes"
    PACKETS = "How packets are moved"
    OBSERVE = "Health, metrics and status"
    LOG = "The log"
    KUBERNETES = "Kubernetes"
    COMMAND = "General"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One flag, as declared. Names have no dashes in front."""

    name: str
    field: str
    """The attribute of the dataclass."""
    parse: Callable[[str], Any]
    """Text to value; ValueError says what is wrong, worded to follow the flag and its text."""
    default: Any
    metavar: str
    """What stands for the value in help; empty for booleans."""
    help: str
    section: Section
    variable: str
    """The environment variable that stands in for the flag; empty for none."""
    is_boolean: bool
    """Booleans take a value only with `=`."""
    is_repeatable: bool
    """The value is a tuple, one item for each time the flag is given."""
    is_secret: bool
    """Never printed nor logged."""
    is_flannels: bool
    """Name, default and syntax are flannel's; else tundp's own."""
    is_settable: bool
    """Whether a configuration file may hold it: flags that are commands may not stand there."""
    takes_file: bool
    """Whether the value names a file, for shell completion."""
    choices: tuple[str, ...]
    """The values there are, if they can be listed."""
    unit: str
    """Of a number: seconds, microseconds, ...; empty for none."""
    since: str
    """The version of tundp that had it first."""
    default_text: str
    """The default in words, where it follows from other flags or is not a text to give."""
    example: str
    """A value worth showing where the default is empty."""
    note: str
    """More for the example file of the systemd unit, where help has no room."""
    no_effect: str
    """Why giving it changes nothing; empty if it has an effect."""

    @property
    def default_words(self) -> str:
        """The default as help shows it; empty for booleans that are off, and for nothing."""
        if self.default_text:
            return self.default_text
        if self.default in ("", (), None, False):
            return ""
        return show(self.default)


def flag(
    name: str = "",
    *,
    help: str,  # noqa: A002
    default: T,
    parse: Callable[[str], Any] | None = None,
    choice: type[Enum] | None = None,
    metavar: str = "",
    section: Section = Section.COMMAND,
    unit: str = "",
    is_repeatable: bool = False,
    is_secret: bool = False,
    is_flannels: bool = False,
    is_settable: bool = True,
    has_variable: bool = True,
    takes_file: bool = False,
    since: str = "0.1.0",
    default_text: str = "",
    example: str = "",
    note: str = "",
    no_effect: str = "",
    choices: tuple[str, ...] = (),
) -> T:
    """Declare a flag: a field of a frozen dataclass.

    name: without dashes; by default the field's with `-` for `_`.
    parse: text to value; by default that of a boolean, of `choice`, or the text itself.
    choice: an enum whose values are what may be given.
    """
    is_boolean = parse is None and isinstance(default, bool)
    if choice is not None:
        choices = tuple(str(each.value) for each in choice)
        parse = parse or one_of(choice)
        metavar = metavar or "|".join(choices)
    made = Flag(
        name=name,
        field="",
        parse=parse_bool if is_boolean else parse or str,
        default=default,
        metavar="" if is_boolean else metavar or unit.upper() or "TEXT",
        help=help,
        section=section,
        variable=(_FLANNELS_PREFIX if is_flannels else _OWN_PREFIX) if has_variable else "",
        is_boolean=is_boolean,
        is_repeatable=is_repeatable,
        is_secret=is_secret,
        is_flannels=is_flannels,
        is_settable=is_settable,
        takes_file=takes_file,
        choices=choices,
        unit=unit,
        since=since,
        default_text=default_text,
        example=example,
        note=note,
        no_effect=no_effect,
    )
    # To type checkers a declared field has the type of its default, as with dataclasses.field.
    return dataclasses.field(default=default, repr=not is_secret, metadata={_METADATA: made})


def option(
    name: str = "",
    *,
    help: str,  # noqa: A002
    default: T,
    parse: Callable[[str], Any] | None = None,
    choice: type[Enum] | None = None,
    metavar: str = "",
    is_repeatable: bool = False,
    takes_file: bool = False,
    since: str = "0.1.0",
    default_text: str = "",
) -> T:
    """Declare an option of one command: no setting of the daemon, so no variable and no file."""
    return flag(
        name,
        help=help,
        default=default,
        parse=parse,
        choice=choice,
        metavar=metavar,
        is_repeatable=is_repeatable,
        takes_file=takes_file,
        since=since,
        default_text=default_text,
        is_settable=False,
        has_variable=False,
    )


@functools.cache
def flags_of(declared: Any) -> tuple[Flag, ...]:
    """The flags a dataclass declares, in order; fields of other kinds are left out."""
    found = []
    for field in dataclasses.fields(declared):
        made = field.metadata.get(_METADATA)
        if made is None:
            continue
        name = made.name or field.name.replace("_", "-")
        variable = made.variable and made.variable + name.upper().replace("-", "_")
        found.append(dataclasses.replace(made, name=name, field=field.name, variable=variable))
    return tuple(found)


_TRUE: Final = frozenset({"1", "t", "T", "true", "TRUE", "True"})
_FALSE: Final = frozenset({"0", "f", "F", "false", "FALSE", "False"})


def parse_bool(text: str) -> bool:
    """Go's strconv.ParseBool."""
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError("is not true or false")


def one_of(choice: type[Enum]) -> Callable[[str], Enum]:
    """A parser that takes the values of an enum, and gives its members."""

    def parse(text: str) -> Enum:
        try:
            return choice(text)
        except ValueError:
            names = ", ".join(str(each.value) for each in choice)
            raise ValueError(f"is not one of {names}") from None

    return parse


def show(value: Any) -> str:
    """A value as the text that gives it: what the flag's parser would take."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Enum):
        return str(value.value)
    if type(value) is tuple:
        return ",".join(show(item) for item in value)
    return str(value)
