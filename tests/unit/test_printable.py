"""Text that somebody else chose, in every place it is shown: one line, escaped, and short."""

from __future__ import annotations

import io
import json
import logging
import socket
import sys
from collections.abc import Callable

import pytest
from rich.console import Console
from rich.text import Text

from tundp.backend.choose import parse_network_config
from tundp.cli import output
from tundp.daemon import logs
from tundp.errors import ConfigError, LeaseFormatError
from tundp.finding import Finding, Verdict
from tundp.layout import Column, Grid, Line
from tundp.lease import codec
from tundp.linux import notify
from tundp.observe.codec import to_json
from tundp.observe.status import SettingStatus
from tundp.printable import LINE_MAX, printable, quoted
from tundp.show import finding_parts

NASTY = {
    "an escape sequence": "\x1b[2J\x1b]0;title\x07",
    "a newline and a forged line": "x\n2026-01-01 00:00:00,000 I tundp: all is well",
    "a carriage return": "x\rall is well",
    "an 8-bit control sequence": "\x9b2J",
    "a bidirectional override": "\u202etxt.exe\u2066",
    "a zero-width joiner": "\u200d\ufeff",
    "a line separator": "a\u2028b\u2029c\u0085d",
    "a lone surrogate": "a\ud800b",
    "a NUL and a DEL": "a\x00b\x7fc",
    "blanks of other kinds": "a\u00a0b\u3000c\td",
    "a megabyte": "k" * 1_000_000,
}
HARMFUL = frozenset("\x00\x07\x1b\x7f\x85\x9b\r\n\t\u2028\u2029\u202e\u2066\u200d\ufeff\ud800")


def assert_harmless(shown: str, what: str = "") -> None:
    """No oracle of the product's: the characters are named one by one."""
    assert not HARMFUL & set(shown), (what, ascii(shown[:200]))


@pytest.mark.parametrize("kind", NASTY)
def test_nothing_harmful_is_left_and_what_it_was_can_be_told(kind: str) -> None:
    shown = printable(NASTY[kind], 300)
    assert_harmless(shown, kind)
    assert len(shown) <= 300
    assert printable(shown, 300) == shown, "made printable twice it is the same"
    shown.encode()


def test_escapes_are_pythons() -> None:
    assert printable("a\x1b[2J\n\u202e\ud800\u00a0b\\c'd") == r"a\x1b[2J\n\u202e\ud800\xa0b\c'd"
    assert quoted("bad\n") == r"'bad\n'"
    assert printable("Größe 日本 10.5.1.0-24&fd00::-64") == "Größe 日本 10.5.1.0-24&fd00::-64"


@pytest.mark.parametrize("limit", [1, 2, 79, 80, 81])
def test_what_is_cut_ends_with_an_ellipsis_and_fits(limit: int) -> None:
    assert printable("k" * limit, limit) == "k" * limit
    assert printable("k" * (limit + 1), limit) == "k" * (limit - 1) + "…"
    assert len(printable("\n" * limit, limit)) <= limit


def key_error(text: str) -> str:
    with pytest.raises(LeaseFormatError) as caught:
        codec.parse_key(text)
    return str(caught.value)


def value_error(text: str) -> str:
    with pytest.raises(LeaseFormatError) as caught:
        codec.parse_value(json.dumps({"PublicIP": text}))
    return str(caught.value)


def number_error(text: str) -> str:
    with pytest.raises(LeaseFormatError) as caught:
        codec.parse_value('{"PublicIP": ' + "9" * len(text) + "e9999.0}")
    return str(caught.value)


def config_error(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_network_config(json.dumps({"Network": text}), "a store")
    return str(caught.value)


def backend_error(text: str) -> str:
    document = {"Network": "10.5.0.0/16", "Backend": {"Type": text}}
    with pytest.raises(ConfigError) as caught:
        parse_network_config(json.dumps(document), "a store")
    return str(caught.value)


def log_line(text: str) -> str:
    record = logging.LogRecord("tundp.x", logging.INFO, "", 1, "peer %s", (text,), None)
    return logs.RedactingFormatter().format(record)


def log_of_another(text: str) -> str:
    """A library formats its message itself."""
    record = logging.LogRecord("etcd", logging.ERROR, "", 1, text, (), None)
    return logs.RedactingFormatter().format(record)


def terminal(text: str) -> str:
    return on_a_terminal(Line(Text.assemble(("ignored:", ""), f" {text}")))


def table(text: str) -> str:
    shown = on_a_terminal(Grid(columns=(Column(head="name"), Column(head="x")), rows=[[text, "x"]]))
    return shown.splitlines()[-1].strip()


def check(text: str) -> str:
    finding = Finding(id="x", verdict=Verdict.WARN, title=text, evidence=text, next_step=text)
    return "".join(map(on_a_terminal, finding_parts([finding]))).replace("\n", " ")


def on_a_terminal(part: object) -> str:
    console = Console(file=io.StringIO(), width=2_000_000, force_terminal=True, color_system=None)
    console.print(part, crop=False)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(shown, str)
    return shown.rstrip("\n")


def stderr(text: str) -> str:
    stream, sys.stderr = sys.stderr, io.StringIO()
    try:
        output.print_error(text)
        return sys.stderr.getvalue().removesuffix("\n")
    finally:
        sys.stderr = stream


def as_json(text: str) -> str:
    finding = Finding(id="x", verdict=Verdict.WARN, evidence=text, facts={"command": text})
    document = to_json(finding)
    return "".join([document["evidence"], document["facts"]["command"]])


@pytest.mark.parametrize("kind", NASTY)
@pytest.mark.parametrize(
    ("show", "most"),
    [
        (key_error, 200),
        (value_error, 200),
        (number_error, 200),
        (config_error, 300),
        (backend_error, 400),
        (log_line, LINE_MAX + 100),
        (log_of_another, LINE_MAX + 100),
        (terminal, LINE_MAX + 100),
        (table, LINE_MAX + 100),
        (check, 3 * LINE_MAX + 100),
        (stderr, LINE_MAX + 100),
        (as_json, 2 * LINE_MAX + 100),
    ],
)
def test_every_place_shows_it_so(show: Callable[[str], str], most: int, kind: str) -> None:
    shown = show(NASTY[kind])
    assert_harmless(shown, kind)
    assert len(shown) <= most


def test_an_errors_text_begins_no_line_of_the_log() -> None:
    forged = "2026-01-01 00:00:00,000 I tundp: all is well"
    try:
        raise ValueError(f"no\n{forged}\x1b[2J")
    except ValueError:
        record = logging.LogRecord("any", logging.ERROR, "", 1, "failed", (), sys.exc_info())
    text = logs.RedactingFormatter().format(record)
    assert "Traceback" in text
    assert not any(line.startswith("2026-01-01") for line in text.splitlines()[1:])
    assert "\x1b" not in text


def test_a_secret_with_odd_characters_is_redacted_all_the_same() -> None:
    password = "pass\u00a0word\x1bx"
    record = logging.LogRecord("x", logging.INFO, "", 1, "with %s", (password,), None)
    text = logs.RedactingFormatter((password,)).format(record)
    assert text.endswith("with ***")


def test_settings_are_read_back_by_programs_and_stay_as_they_are() -> None:
    """`config show` and `config check` use the running daemon's."""
    value = "/tmp/a\u00a0b\n" + "x" * 5000
    assert to_json(SettingStatus(value=value, origin="--flag"))["value"] == value


def test_a_status_for_systemd_is_one_field(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A newline in it would begin another one: READY=1, MAINPID=1."""
    path = str(tmp_path_factory.mktemp("n") / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(path)
        server.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        notify.notify("STATUS=waiting for x\nREADY=1\nMAINPID=1", "WATCHDOG=1")
        assert server.recv(4096) == b"STATUS=waiting for x\\nREADY=1\\nMAINPID=1\nWATCHDOG=1"
