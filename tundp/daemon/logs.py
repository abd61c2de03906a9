"""Logging of a daemon: levels of our own loggers, of others' by name, and never a secret.

`-v` sets the level of the loggers of this package. Libraries stay at WARNING whatever it
is: with etcd's authentication on, their debugging shows session tokens. `--vmodule` sets
single loggers, a library's too. Every line is redacted on its way out, whoever logs it, and
lines of one kind are counted from the twentieth on.
"""

from __future__ import annotations

import base64
import logging
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

from tundp.backoff import TokenBucket
from tundp.daemon.log_writer import LogWriter
from tundp.printable import LINE_MAX, printable

OWN: Final = "tundp"
FORMAT: Final = "%(asctime)s %(levelname).1s %(name)s: %(message)s"
NOISY: Final = ("etcd", "urllib3", "pyroute2", "aiohttp", "grpclib", "h2")
"""Libraries that report each failed request at ERROR; the stores report an outage once."""
MUTE: Final = ("hpack", "hyperframe")
"""Libraries whose debugging shows headers in a coded form no pattern would find."""
MIN_SECRET_LEN: Final = 4
"""Shorter passwords are not searched for: each line would be full of them."""
BURST: Final = 20
"""Lines of one kind at once."""
ALL_BURST: Final = 200
"""The same of all kinds that differ in the first argument only."""
_KINDS: Final = 1000
_KIND_LEN: Final = 100

_NUMBER: Final = re.compile(r"-?\d{1,9}")
_NAME: Final = r"(?:token|authorization|passw(?:or)?d|secret|cookie)"
_PLACES: Final[tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]] = (
    # authorization: Basic dTpw   token=abc   "password": "p"
    (
        rf"""({_NAME}['"]?\s*[:=]\s*(?:b?['"])?(?:(?:basic|bearer)\s+)?)[^\s'",;)}}\]]+""",
        r"\1***",
    ),
    # (b'token', b'abc')
    (rf"""({_NAME}['"]\s*,\s*b?['"])[^'"]+""", r"\1***"),
    # -etcd-password p
    (r"(-etcd-password\s+)(?!and\b)\S+", r"\1***"),
    # http://user:password@host
    (r"(\w://)[^/\s@]+@", r"\1***@"),
    # A JSON web token, and etcd's simple token (auth/simple_token.go: 16 letters, a revision).
    # All of a word is taken, token or not, so that none of it is looked at once more.
    (r"\beyJ[\w-]+(\.[\w-]+\.[\w-]*)?", lambda found: "***" if found[1] else found[0]),
    (r"\b[A-Za-z]{16}\.\d+\b", "***"),
)
"""What stands where secrets do, each in time that grows as the text does; and what is put there."""
_PATTERNS: Final = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement) for pattern, replacement in _PLACES
)


def redact_places(text: str) -> str:
    """The text with `***` for whatever stands where tokens, passwords and credentials do."""
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


class RedactingFormatter(logging.Formatter):
    """A formatter of whole lines, tracebacks included, with secrets replaced by `***`.

    Secrets are the values of `secrets`, plain and as HTTP's basic authentication codes
    them, and whatever stands where tokens, passwords and credentials in a URL do.
    """

    def __init__(self, secrets: tuple[str, ...] = ()) -> None:
        super().__init__(FORMAT)
        self._secrets: frozenset[str] = frozenset()
        self._known: re.Pattern[str] | None = None
        self.hide(secrets)

    def hide(self, secrets: Iterable[str]) -> None:
        """Replace these, too, from now on."""
        secrets = self._secrets.union(text for text in secrets if len(text) >= MIN_SECRET_LEN)
        if secrets != self._secrets:
            self._secrets = secrets
            texts = "|".join(map(re.escape, sorted(secrets, key=len, reverse=True)))
            self._known = re.compile(rf"(?<!\w)(?:{texts})(?!\w)")

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        return self._redacted(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """See logging.Formatter. One line, whatever names are in the message."""
        record.message = printable(self._redacted(record.message), LINE_MAX)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """See logging.Formatter. Indented, so that an error's text begins no line of its own."""
        lines = self._redacted(super().formatException(ei)).split("\n")
        return "\n".join(f"  {printable(line, LINE_MAX)}" for line in lines)

    def _redacted(self, text: str) -> str:
        if self._known is not None:
            text = self._known.sub("***", text)
        return redact_places(text)


class RepeatFilter(logging.Filter):
    """Lets of each kind of line BURST through at once and one a minute, and counts the rest.

    The last resort against what fails or changes without end: lines that are known to repeat
    have rations of their own (tundp.backoff). A kind is a logger and a template, with the first
    argument where the template begins with it. Debugging passes: somebody asked for it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._buckets: dict[tuple[str, str, str], TokenBucket] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """See logging.Filter. A line after ones that were held back says how many."""
        if record.levelno < logging.INFO:
            return True
        template = str(record.msg)
        first = ""
        if template.startswith("%s") and isinstance(record.args, tuple) and record.args:
            first = str(record.args[0])[:_KIND_LEN]
        buckets = [self._bucket((record.name, template[:_KIND_LEN], first), BURST)]
        if first:
            # Who chooses the first argument must not choose how many kinds there are.
            buckets.append(self._bucket((record.name, template[:_KIND_LEN], ""), ALL_BURST))
        now = self._clock()
        if not all(bucket.take(now) for bucket in buckets):
            return False
        if withheld := sum(bucket.withheld for bucket in buckets):
            record.msg = f"{template} (and {withheld} more lines like this since)"
            for bucket in buckets:
                bucket.withheld = 0
        return True

    def _bucket(self, kind: tuple[str, str, str], burst: int) -> TokenBucket:
        """The kinds seen last stay: dictionaries keep the order of insertion."""
        bucket = self._buckets.pop(kind, None) or TokenBucket(burst)
        self._buckets[kind] = bucket
        if len(self._buckets) > _KINDS:
            del self._buckets[next(iter(self._buckets))]
        return bucket


def set_up(level: int, modules: str = "", *, username: str = "", password: str = "") -> list[str]:
    """Log to stderr; returns the items of `modules` that have no effect, for a warning.

    level: -1 errors, 0 information, above debugging; of this package's loggers.
    modules: `name=level,...` of single loggers and those below them, of libraries too.
    """
    handler = LogWriter()
    handler.addFilter(RepeatFilter())
    handler.setFormatter(RedactingFormatter(_forms(username, password)))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger(OWN).setLevel(_severity(level))
    for library in (*NOISY, *MUTE):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    unknown = []
    for item in filter(None, (part.strip() for part in modules.split(","))):
        name, _, text = item.partition("=")
        if not _NUMBER.fullmatch(text) or not name or name.partition(".")[0] in MUTE:
            unknown.append(item)
        else:
            logging.getLogger(name).setLevel(_severity(int(text)))
    return unknown


def hide(*, username: str, password: str) -> None:
    """Keep a password that came later out of the log, too."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, RedactingFormatter):
            handler.formatter.hide(_forms(username, password))


def _forms(username: str, password: str) -> tuple[str, ...]:
    """A password as it may stand in a line: plain, and as HTTP's basic authentication codes it."""
    if not password:
        return ()
    basic = base64.b64encode(f"{username}:{password}".encode("latin-1", "replace")).decode()
    return password, basic


def _severity(level: int) -> int:
    if level < 0:
        return logging.ERROR
    return logging.INFO if level == 0 else logging.DEBUG


def write_apart() -> None:
    """Let a thread write the log from now on, so that nobody waits for who reads it."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, LogWriter):
            handler.start()
