"""Settings written out: as TOML, as a daemon reports them, as an example file of every flag."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any, Final

from tundp.settings.declare import Flag, Section, show
from tundp.settings.settings import SETTABLE, Settings

_BLANKED: Final = "***"
_ORIGIN_COLUMN: Final = 60
_COMMENT_WIDTH: Final = 90


def toml_lines(settings: Settings, *, with_origin: bool) -> Iterator[str]:
    """Every setting, a line each, as --config would read it; secrets blanked."""
    for flag in SETTABLE:
        line = f"{flag.name} = {_toml(_plain(settings, flag))}"
        if with_origin:
            line = f"{line:<{_ORIGIN_COLUMN}} # {settings.origins[flag.name]}"
        yield line


def reported(settings: Settings) -> dict[str, str]:
    """Flag name to value, as a daemon reports its settings; secrets blanked.

    Values are texts as on the command line; those of repeatable flags are JSON arrays of them.
    """
    found = {}
    for flag in SETTABLE:
        value = _plain(settings, flag)
        if flag.is_repeatable:
            found[flag.name] = json.dumps(value, ensure_ascii=False)
        else:
            found[flag.name] = show(value)
    return found


def _plain(settings: Settings, flag: Flag) -> Any:
    """One setting as true, false, a number, a text, or for a repeatable flag a list of texts."""
    value = getattr(settings, flag.field)
    if flag.is_secret:
        return _BLANKED if value else ""
    if isinstance(value, (bool, int)):
        return value
    return [show(item) for item in value] if flag.is_repeatable else show(value)


def example_lines() -> Iterator[str]:
    """A file for --config with every setting commented out at its default."""
    yield "# For `tundp run --config=FILE`. Flags and variables of the same name win over it."
    defaults = Settings()
    for section in Section:
        flags = [flag for flag in SETTABLE if flag.section is section]
        if not flags:
            continue
        yield ""
        yield f"# --- {section.value}"
        for flag in flags:
            yield ""
            text = f"{flag.help} [{flag.variable}]"
            for line in textwrap.wrap(text, _COMMENT_WIDTH, break_on_hyphens=False):
                yield f"# {line}"
            yield f"#{flag.name} = {_toml(_plain(defaults, flag))}"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(_toml_text(item) for item in value)}]"
    return _toml_text(value) if isinstance(value, str) else str(value)


def _toml_text(text: str) -> str:
    """A basic string: JSON's, but with no surrogate pairs, and DEL escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
