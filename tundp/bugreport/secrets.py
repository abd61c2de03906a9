"""Secrets in what is collected: where they are known from, and every form they may stand in.

A known secret is found plain, percent-encoded, escaped as in JSON, Python or a shell, in base64
(alone or inside a longer text) and in hex. An unknown one is found by its place: behind `token:`,
`password=`, `Authorization:` and the like, in a URL before the @, between the lines of a PEM key.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final
from urllib.parse import unquote

from tundp.daemon.logs import redact_places
from tundp.settings.settings import SETTABLE, Settings

BLANKED: Final = "***"
LEAST_LEN: Final = 4
"""Characters of a secret that is searched for; a shorter one is found by its place only."""
_CODED_LEAST: Final = 6
"""The same of base64, which has fewer characters that depend on the secret alone."""
SECRET_FLAGS: Final = tuple(flag for flag in SETTABLE if flag.is_secret)
_WORDS: Final = (
    r"(?:passw(?:or)?d|[-_]pwd|(?<!by)pass(?:phrase)?(?![a-z])|secret|token|(?<!load)credential"
    r"|(?:private|access|api)[-_]?key|authorization|[-_]auth(?![a-z])|cookie)"
)
_NAME: Final = re.compile(_WORDS, re.IGNORECASE)
_NOT_SECRET: Final = re.compile(r"(?:file|path|dir|url|user(?:name)?)$", re.IGNORECASE)
_USER: Final = re.compile(r"user(?:name)?$", re.IGNORECASE)
_PEM: Final = re.compile(
    r"-----BEGIN ([A-Z0-9 ]*PRIVATE KEY)-----.*?(?:-----END \1-----|\Z)", re.DOTALL
)
_USERINFO: Final = re.compile(r"\w://([^/\s@\"'<>]+)@")
_MORE_PLACES: Final = tuple(
    (re.compile(pattern, re.IGNORECASE | re.MULTILINE), replacement)
    for pattern, replacement in (
        # Each takes time that grows as the text does: of a name only what is behind its word, and
        # not without end.
        # FLANNELD_ETCD_PASSWORD="p x"   etcd-password = "p x"   "etcd_password": "p"
        (
            rf"""({_WORDS}\w{{0,64}}["']?\s*[=:]\s*)"""
            r"""(?:"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')""",
            r'\1"***"',
        ),
        # PROXY_PASSPHRASE=p   AWS_SECRET_ACCESS_KEY=p
        (
            rf"({_WORDS}\w{{0,64}}(?<!file)(?<!path)(?<!dir)(?<!url)(?<!user)(?<!username)=)"
            r"""[^\s"']+""",
            r"\1***",
        ),
        # ETCDCTL_USER=root:p   --user root:p
        (r"(user(?:name)?(?:=|(?<=-user) )[\"']?[^:=\s/\"']{1,256}:)[^\s\"']+", r"\1***"),
        # systemd.exec(5), and on the kernel's command line systemd.system-credentials(7)
        (r'("systemd\.set_credential\w{0,16}=)[^"\n]*', r"\1***"),
        (r'(systemd\.set_credential\w{0,16}=)(?:"[^"\n]*"|\S+)', r"\1***"),
        (r"(^[ \t]*SetCredential\w{0,16}[ \t]*=[ \t]*)(?:[^\\\n]|\\.|\\\n)+", r"\1***"),
        (r"(\bbasic\s+)[A-Za-z0-9+/_-]{4,}=*", r"\1***"),
        (r"(\bbearer\s+)[\w.~+/-]{4,}=*", r"\1***"),
    )
)


def is_secret_name(name: str) -> bool:
    """Whether a variable, flag or JSON member of this name holds a secret."""
    return bool(_NAME.search(name)) and not _NOT_SECRET.search(name)


class Secrets:
    """The secrets that are known by now, and their removal from text."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._forms: set[str] = set()
        self._pattern: re.Pattern[str] | None = None

    def __len__(self) -> int:
        """How many are known, of at least LEAST_LEN characters."""
        return len(self._known)

    def add(self, secret: str, username: str = "") -> None:
        """Hide `secret` from now on; username: whose it is, for HTTP's basic authentication."""
        for text in {secret, unquote(secret)}:
            if len(text) < LEAST_LEN or text == BLANKED:
                continue
            if text not in self._known:
                self._known.add(text)
                self._forms.update(_forms(text))
                self._pattern = None
            if username:
                self._forms.update(_coded(f"{username}:{text}"))
                self._pattern = None

    def add_url(self, text: str) -> None:
        """Hide what stands before the @ of each URL in a text."""
        for userinfo in _USERINFO.findall(text):
            username, colon, password = userinfo.partition(":")
            self.add(password if colon else userinfo, unquote(username) if colon else "")

    def add_settings(self, settings: Settings) -> None:
        """Hide the secrets of a daemon's settings."""
        for flag in SECRET_FLAGS:
            self.add(str(getattr(settings, flag.field)), settings.etcd_username)
        for flag in SETTABLE:
            value = getattr(settings, flag.field)
            for each in value if isinstance(value, tuple) else (value,):
                self.add_url(str(each))

    def add_variables(self, variables: Mapping[str, str]) -> None:
        """Hide the values of environment variables that hold secrets."""
        names = {flag.variable for flag in SECRET_FLAGS}
        username = variables.get("FLANNELD_ETCD_USERNAME", "")
        for name, value in variables.items():
            self.add_url(value)
            bare = value.strip().strip("\"'")
            if name in names or is_secret_name(name):
                self.add(value, username)
                self.add(bare, username)
            elif _USER.search(name) and ":" in bare:  # ETCDCTL_USER=root:p
                owner, _, password = bare.partition(":")
                self.add(password, owner)

    def add_arguments(self, arguments: Iterable[str]) -> None:
        """Hide the values of a command line's flags that hold secrets."""
        words, is_next = list(arguments), False
        for word in words:
            self.add_url(word)
            if is_next:
                self.add(word)
            name, equals, value = word.lstrip("-").partition("=")
            is_secret = word.startswith("-") and any(name == flag.name for flag in SECRET_FLAGS)
            if is_secret and equals:
                self.add(value)
            is_next = is_secret and not equals

    def hide(self, text: str) -> str:
        """The text without any of them, and without what stands where secrets do."""
        if self._pattern is None and self._forms:
            forms = sorted(self._forms, key=len, reverse=True)
            self._pattern = re.compile("|".join(forms))
        if self._pattern is not None:
            text = self._pattern.sub(BLANKED, text)
        text = _PEM.sub(rf"-----BEGIN \1----- {BLANKED}", text)
        for pattern, replacement in _MORE_PLACES:
            text = pattern.sub(replacement, text)
        return redact_places(text)


def _forms(secret: str) -> Iterator[str]:
    """Patterns of a secret: written in any way, in base64, in hex."""
    # A backslash of JSON in JSON in JSON has 15 before it.
    yield r"\\{0,15}".join(map(_any_form, secret))
    yield from _coded(secret)
    yield f"(?i:{secret.encode().hex()})"


def _any_form(character: str) -> str:
    """A pattern of one character: itself, percent-encoded, or escaped by its number."""
    percent = "".join(f"%{byte:02x}" for byte in character.encode())
    utf16 = character.encode("utf-16-be")
    units = [utf16[at : at + 2].hex() for at in range(0, len(utf16), 2)]
    json = "".join(rf"\\u{unit}" for unit in units)
    found = [re.escape(character), f"(?i:{percent}|{json})"]
    if ord(character) < 0x100:
        found.append(rf"(?i:\\x{ord(character):02x})")
    if character == " ":
        found.append(r"\+")
    return f"(?:{'|'.join(found)})"


def _coded(text: str) -> Iterator[str]:
    """Patterns of a text in base64 (RFC 4648), at each of its three places in a longer text."""
    data = text.encode(errors="replace")
    for offset in range(3):
        coded = base64.b64encode(bytes(offset) + data).decode().rstrip("=")
        # What depends on the bytes before, and on those behind.
        start = (0, 2, 3)[offset]
        end = len(coded) - (1 if (len(data) + offset) % 3 else 0)
        core = coded[start:end]
        if len(core) >= _CODED_LEAST:
            yield "".join(
                {"+": r"(?:\+|-|%2[Bb])", "/": r"(?:/|_|%2[Ff])"}.get(each, each) for each in core
            )
