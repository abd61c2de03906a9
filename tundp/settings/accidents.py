"""What Kubernetes, quoting and editors put into variables by accident, told from a typo.

Only how a variable got there is forgiven, never what it means:

    tcp://10.96.0.5:8080     a Kubernetes service link: as if not set. A pod gets them for every
                             Service of its namespace; one named flanneld-healthz makes
                             FLANNELD_HEALTHZ_PORT of it
    "8080"  '8080'           quotes that docker --env-file and YAML left in: taken without them
    8080 and blanks or CR    trailing blanks, or a file with Windows line ends: taken without them
    ""  blanks alone         as if not set

Each with one warning that names the variable. Anything else that is wrong is a typo: an error,
exit code 2. A password is taken as it is, since it may have quotes and blanks of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from tundp.settings.declare import Flag

_LINK: Final = re.compile(r"(?:tcp|udp|sctp)://\S+", re.IGNORECASE)
_LINK_NAME: Final = re.compile(
    r"[A-Z0-9_]+_(?:SERVICE_HOST|SERVICE_PORT(?:_[A-Z0-9_]+)?"
    r"|PORT_[0-9]+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)"
)
"""Names that the kubelet makes (kubernetes/pkg/kubelet/envvars/envvars.go)."""
_BLANKS: Final = " \t\r\n\v\f\u00a0\ufeff"
_QUOTES: Final = ("'", '"')


class Reading(NamedTuple):
    """The text of a variable to go by, empty for none, and what was odd about it."""

    text: str
    accident: str
    """A sentence, or empty."""


def read_variable(flag: Flag, name: str, raw: str) -> Reading:
    """What variable `name` with the value `raw` says of `flag`."""
    text = _unquoted(raw)
    if flag.is_secret:
        odd = "" if text == raw else f"{name} has quotes or blanks around it: taken as it is"
        return Reading(raw, odd)
    if _LINK.fullmatch(text):
        return Reading("", f"{name}={text} is a Kubernetes service link, no setting: {_IGNORED}")
    if text == raw:
        return Reading(raw, "")
    if not text:
        return Reading("", f"{name} is {raw!r}, which is nothing: ignored")
    return Reading(text, f"{name} is {raw!r}: taken as {text}, without quotes and blanks around")


_IGNORED: Final = "ignored; enableServiceLinks: false in the pod's spec leaves them out"


def is_service_link(name: str, text: str) -> bool:
    """Whether Kubernetes made this variable, for a Service that has a name like ours."""
    return bool(_LINK_NAME.fullmatch(name) or _LINK.fullmatch(text))


def links_sentence(environment: Mapping[str, str], prefixes: tuple[str, ...]) -> str:
    """One sentence about all service links whose names begin with `prefixes`, or empty."""
    names = sorted(
        name
        for name, text in environment.items()
        if name.startswith(prefixes) and _LINK_NAME.fullmatch(name) and text
    )
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"variables {', '.join(names[:3])}{more} are Kubernetes' links to a Service"
        f" with such a name: {_IGNORED}"
    )


def _unquoted(raw: str) -> str:
    """Without blanks around, then without one pair of quotes and the blanks inside it."""
    text = raw.strip(_BLANKS)
    if len(text) >= 2 and text[0] == text[-1] and text[0] in _QUOTES:
        inner = text[1:-1]
        if text[0] not in inner:
            return inner.strip(_BLANKS)
    return text
