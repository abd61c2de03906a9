"""Files of settings as they may be shown: values of declared settings that are no secret.

Names do not tell what holds a secret (`PROXY_PASSPHRASE`, `PGPASS`, `ETCDCTL_USER=root:p`). So the
value of any name tundp does not declare itself is blanked, and comments are: old passwords stand
there.
"""

from __future__ import annotations

import json
import tomllib
from typing import Any, Final

from tundp.bugreport.secrets import BLANKED
from tundp.settings.settings import FLAGS

_SHOWN_VARIABLES: Final = frozenset(
    each.variable for each in FLAGS if each.variable and not each.is_secret
)
_SHOWN_KEYS: Final = frozenset(each.name for each in FLAGS if not each.is_secret)


def shown_variables(text: str) -> str:
    """An EnvironmentFile= (systemd.exec(5)) with values of declared, not secret, variables only."""
    joined = text.replace("\\\n", "")
    return "\n".join(_shown_line(line, _SHOWN_VARIABLES) for line in joined.split("\n"))


def shown_config(text: str) -> str:
    """A file of --config (TOML) with values of declared settings only, a key a line.

    One that is not TOML is shown line by line, by what stands before the first =.
    """
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # The error may quote the text, but never more than one character of it.
        shown = "\n".join(_shown_line(line, _SHOWN_KEYS) for line in text.split("\n"))
        return f"# not TOML: {error}\n{shown}"
    lines = [f"{_key(name)} = {_value(name, value)}" for name, value in document.items()]
    return "\n".join([*lines, ""])


def _shown_line(line: str, names: frozenset[str]) -> str:
    name, equals, _ = line.partition("=")
    bare = name.strip()
    if equals and bare in names:
        return line
    if bare.startswith(("#", ";")):
        # What is commented out is shown as what is not, and prose is not shown.
        rest = bare[1:].strip()
        return line if equals and rest in names else f"{bare[0]}{BLANKED}"
    if equals:
        return f"{name}={BLANKED}"
    return BLANKED if bare else ""


def _key(name: str) -> str:
    return name if name.replace("-", "").isalnum() and name.isascii() else json.dumps(name)


def _value(name: str, value: Any) -> str:
    items = value if isinstance(value, list) else [value]
    # Tables, dates and times are no settings.
    if name not in _SHOWN_KEYS or not all(isinstance(each, (str, int, float)) for each in items):
        return json.dumps(BLANKED)
    return json.dumps(value, ensure_ascii=False)
