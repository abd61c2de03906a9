"""Regular expressions as Go's regexp package has them, for --iface-regex."""

from __future__ import annotations

import re
from typing import Final

from tundp.errors import ConfigError

_GO_TOKEN: Final = re.compile(
    r"""
      (?P<escape> \\ . )
    | (?P<set> \[ \^? \]? (?: \\. | \[:\^?[a-z]+:\] | [^\]\\] )* \] )
    | (?P<group> \(\? (?! P<\w+> | [ims]*(?:-[ims]+)?[:)] ) )
    | (?P<possessive> (?: [*+?] | \{\d+(?:,\d*)?\} ) \+ )
    | (?P<brace> \{ (?= ,\d*\} ) )
    """,
    re.VERBOSE | re.DOTALL,
)
_IN_SET: Final = re.compile(r"(?P<escape>\\.)|\[:(?P<posix>\^?[a-z]+):\]|[\[&|~]", re.DOTALL)
_POSIX: Final = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "digit": "0-9",
    "lower": "a-z",
    "punct": r"!-/:-@\[-`{-~",
    "space": r"\t\n\v\f\r ",
    "upper": "A-Z",
    "word": "0-9A-Za-z_",
    "xdigit": "0-9A-Fa-f",
}


def compile_go_regex(text: str) -> re.Pattern[str]:
    r"""`text`, written for Go's regexp, as a pattern of ours. ConfigError if it is none.

    What compiles means here what it means there: ASCII classes, [[:digit:]], \z. What
    Go refuses is refused: backreferences, lookaround, conditional and atomic groups,
    possessive repeats, comments, \Z \u \U \N. Go knows more, which is refused as well:
    \p{...}, \C, \Q...\E, \x{...}, (?U), (?<name>...), (?i) elsewhere than at the start, and
    the POSIX classes of what no name or address has in it. Two differences are left, for
    nothing here meets them: Go refuses repeats above 1000, and has no \v in its \s.
    """

    def fail(reason: str) -> ConfigError:
        return ConfigError(f"could not compile the IP address regex '{text}': {reason}")

    def escape(pair: str) -> str:
        if pair[1] in "123456789":
            raise fail(f"{pair}: backreferences are not supported")
        if pair[1] in "ZuUN":
            raise fail(f"{pair}: no such escape")
        return r"\Z" if pair == r"\z" else pair

    def in_set(found: re.Match[str]) -> str:
        if found["escape"] == r"\b":
            raise fail(r"\b: no such escape in a set")  # backspace in Python
        if found["escape"]:
            return escape(found[0])
        if found["posix"] is None:
            # Python keeps "[", "&&" and such for sets of sets, some day.
            return "\\" + found[0]
        if found["posix"] not in _POSIX:
            raise fail(f"{found[0]} is not supported")
        return _POSIX[found["posix"]]

    def translate(found: re.Match[str]) -> str:
        if found["escape"]:
            return escape(found[0])
        if found["set"]:
            return "[" + _IN_SET.sub(in_set, found[0][1:])
        if found["brace"]:
            return r"\{"  # {,3} is text in Go
        if found["possessive"]:
            raise fail(f"invalid nested repetition operator: {found[0]}")
        raise fail(f"{text[found.start() : found.start() + 4]}: no such group (lookaround?)")

    try:
        return re.compile(_GO_TOKEN.sub(translate, text), re.ASCII)
    except (re.error, OverflowError) as error:
        raise fail(str(error)) from None
