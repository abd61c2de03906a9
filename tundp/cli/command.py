"""What a command is: its name, flags and help, and reading its command line.

A command's own options and the daemon's settings that concern it are declared alike
(settings/declare.py), so every command takes flags in Go's and GNU's spelling, and for settings
environment variables and --config, too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

from tundp.errors import ConfigError
from tundp.settings import goflags
from tundp.settings.declare import Flag, flags_of
from tundp.settings.help import flag_lines
from tundp.settings.settings import FLAGS, Settings
from tundp.settings.sources import resolve

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")
OptionsT = TypeVar("OptionsT")

HELP: Final = next(each for each in FLAGS if each.name == "help")
DAEMON_FLAGS: Final = tuple(each for each in FLAGS if each.name not in ("help", "version"))
"""Every flag of `tundp run` that is a setting."""
WHICH_DAEMON: Final = tuple(
    each for each in FLAGS if each.name in ("subnet-file", "admin-socket", "config")
)
"""The flags that tell which daemon of the host is meant."""


@dataclass(frozen=True, slots=True)
class NoOptions:
    """The options of a command that has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given(Generic[OptionsT]):
    """What the command line said."""

    options: OptionsT
    operands: tuple[str, ...]
    flags: Mapping[str, Any]
    """The daemon's flags that were given: name to value."""
    concerned: tuple[Flag, ...]
    ignored: tuple[str, ...]
    """Arguments from the first stray one on, where these are ignored."""

    def settings(self) -> Settings:
        """The daemon's settings of flags, environment and file."""
        return resolve(self.flags, os.environ, concerned=self.concerned, ignored=self.ignored)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command(Generic[OptionsT]):
    """One command of `tundp`."""

    name: str
    """What follows `tundp`: one word, or a group's and its own."""
    summary: str
    """One line, for the list of commands."""
    description: str
    run: Callable[[Given[OptionsT]], int]
    """The exit code; TundpError is printed by the caller, as exit code 1, ConfigError as 2."""
    options: type[OptionsT]
    settings: tuple[Flag, ...] = ()
    """The daemon's flags that concern it."""
    operands: tuple[str, ...] = ()
    """Names of what has to be given beside flags."""
    optional: tuple[str, ...] = ()
    """Names of what may be given after those."""
    more_operands: str = ""
    """Name of what may be given behind these, any number of words of it; empty for nothing."""
    examples: tuple[tuple[str, str], ...] = ()
    """Command lines and what they do."""
    notes: str = ""
    """Ends the help: exit codes, limits."""
    rewrite: Callable[[Sequence[str]], list[str]] = list
    """Turns an older program's command line into one of flags."""
    exit_usage: int = 2
    """The exit code of wrong usage."""
    is_script: bool = False
    """Whether it is a program of its own, not a command of `tundp`."""
    ignores_stray: bool = False
    """Whether the first argument that is no flag ends the flags without being an error."""

    @property
    def own_flags(self) -> tuple[Flag, ...]:
        """The command's own options."""
        return flags_of(cast("Any", self.options))

    @property
    def flags(self) -> tuple[Flag, ...]:
        """Every flag it takes."""
        return _once((*self.own_flags, *self.settings, HELP))

    def main(self, arguments: Sequence[str]) -> int:
        """Read the command line and run the command; its exit code.

        ConfigError names what is wrong with the command line.
        """
        # numpy's library starts a thread for each CPU else, for nothing, and where none can be
        # started it ends the process by SIGINT.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        parsed = goflags.parse(
            self.rewrite(arguments),
            self.flags,
            operand_count=self.operand_count,
            ignores_stray=self.ignores_stray,
            command=self.full_name,
        )
        if parsed.values.get("help"):
            print("\n".join(self.help_lines()))
            return 0
        if len(parsed.operands) < len(self.operands):
            missing = self.operands[len(parsed.operands)]
            raise ConfigError(f"{missing} is missing: {self.usage}")
        values = dict(parsed.values)
        own = {each.field: values.pop(each.name) for each in self.own_flags if each.name in values}
        return self.run(
            Given(
                options=self.options(**own),
                operands=parsed.operands,
                flags=values,
                concerned=self.settings,
                ignored=parsed.ignored,
            )
        )

    @property
    def usage(self) -> str:
        """One line."""
        words = f" {self.operand_words}" if self.operand_words else ""
        return f"usage: {self.full_name}{words} [flags]"

    @property
    def operand_count(self) -> int | None:
        """How many operands may be given; None for any number."""
        return None if self.more_operands else len(self.operands) + len(self.optional)

    @property
    def operand_words(self) -> str:
        """What is given beside flags: SRC DST [PROTO [PORT]]."""
        optional = "".join(f" [{name}" for name in self.optional) + "]" * len(self.optional)
        more = f" [{self.more_operands}...]" if self.more_operands else ""
        return f"{' '.join(self.operands)}{optional}{more}".strip()

    @property
    def full_name(self) -> str:
        """As it is typed."""
        return self.name if self.is_script else f"tundp {self.name}"

    def flag_groups(self) -> list[tuple[str, Sequence[Flag]]]:
        """The flags help lists, under titles."""
        found: list[tuple[str, Sequence[Flag]]] = [("flags", (*self.own_flags, HELP))]
        if self.settings and self.settings != DAEMON_FLAGS:
            found.append(("settings of the daemon", self.settings))
        return found

    def help_lines(self) -> Iterator[str]:
        """What --help prints."""
        yield self.usage
        yield ""
        yield self.description
        width = shutil.get_terminal_size().columns
        for title, flags in self.flag_groups():
            yield from ("", f"{title}:", *flag_lines(flags, width))
        if self.settings == DAEMON_FLAGS:
            yield ""
            yield "and every flag of `tundp run`, by variable and --config, too: tundp run --help"
        if self.examples:
            yield ""
            yield "examples:"
            yield from example_lines(self.examples)
        if self.notes:
            yield ""
            yield self.notes


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, on a loop of its own."""
    import asyncio  # 0.04 s that --help need not wait for

    return asyncio.run(main)


@contextlib.asynccontextmanager
async def named_query_errors(text: str) -> AsyncIterator[None]:
    """A filter that the daemon refuses is wrong usage: ConfigError, with its place."""
    from tundp.observe.events import BadQuery

    try:
        yield
    except BadQuery as error:
        place = "" if error.position is None else f", at character {error.position + 1}"
        raise ConfigError(f"filter {text!r}: {error}{place}") from None


async def or_stopped(stop: asyncio.Event, opening: Coroutine[Any, Any, T]) -> T | None:
    """Run it to its end; None if the operator has enough before."""
    import asyncio

    task, stopped = asyncio.ensure_future(opening), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, stopped):
            each.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)


def example_lines(examples: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Command lines, with what they do beside or below them."""
    column = 45
    for line, does in examples:
        if len(line) < column - 4:
            yield f"  {line:<{column - 4}}  {does}".rstrip()
        else:
            yield f"  {line}"
            if does:
                yield f"{'':<{column}}{does}"


def _once(flags: Sequence[Flag]) -> tuple[Flag, ...]:
    return tuple({each.name: each for each in flags}.values())
