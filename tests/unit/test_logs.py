"""Whose debugging is logged at which level, and that no line carries a secret."""

from __future__ import annotations

import ast
import base64
import logging
import subprocess
import sys

import pytest

from tundp.daemon import logs
from tundp.daemon.logs import BURST, RepeatFilter

PASSWORD = "correct horse"


def formatted(message: str, *arguments: object) -> str:
    basic = base64.b64encode(f"flannel:{PASSWORD}".encode()).decode()
    formatter = logs.RedactingFormatter((PASSWORD, basic))
    record = logging.LogRecord("any", logging.DEBUG, __file__, 1, message, arguments, None)
    return formatter.format(record)


@pytest.mark.parametrize(
    ("message", "secret"),
    [
        ("Adding b'token'=b'hidden' to the table", "hidden"),
        ("Adding (b'token', b'hidden') to the header table", "hidden"),
        ("Encoding ('authorization', 'Bearer hidden')", "hidden"),
        ("Authorization: Basic aGlkZGVu", "aGlkZGVu"),
        ("Authorization: Bearer hidden, next", "hidden"),
        ("{'token': 'hidden', 'hasleader': 'true'}", "hidden"),
        ('name: "flannel" password: "hidden"', "hidden"),
        ('{"name": "flannel", "password": "hidden"}', "hidden"),
        ("ETCD_PASSWORD=hidden", "hidden"),
        ("arguments are ignored: true -etcd-password hidden -v 1", "hidden"),
        ("arguments are ignored: true --etcd-password=hidden", "hidden"),
        ("GET http://root:hidden@192.0.2.9:2379/v2/keys", "hidden"),
        ("got nWmmGsPqUXzHJWUk.1234 from the server", "nWmmGsPqUXzHJWUk"),
        ("got eyJhbGciOiJSUzI1NiJ9.eyJ1c2VyIjoicm9vdCJ9.c2lnbmF0dXJl", "eyJ1c2VyIjoicm9vdCJ9"),
        (f"somebody wrote {PASSWORD} here", PASSWORD),
        ("somebody wrote Zmxhbm5lbDpjb3JyZWN0IGhvcnNl here", "Zmxhbm5lbDpjb3Jy"),
    ],
)
def test_secret_is_replaced(message: str, secret: str) -> None:
    assert secret in message
    assert secret not in formatted("%s", message)
    assert "***" in formatted("%s", message)


@pytest.mark.parametrize(
    "message",
    [
        "lease 10.5.7.0-24, subnet 10.5.7.0/24 (new)",
        "peer 10.5.25.0/24 at 192.0.2.2, before at 192.0.2.3",
        "etcd at http://192.0.2.9:2379 denies access: check --etcd-username, --etcd-password and",
        "use --etcd-username and FLANNELD_ETCD_PASSWORD, which are never logged",
        "invalid auth token",
        "network 10.5.0.0/16, udp port 8285, from etcd v3 at http://192.0.2.254:2379/coreos.com",
    ],
)
def test_other_lines_stay_as_they_are(message: str) -> None:
    assert formatted("%s", message).endswith(f": {message}")


def test_traceback_is_redacted_too() -> None:
    formatter = logs.RedactingFormatter((PASSWORD,))
    try:
        raise ValueError(f"cannot log in with {PASSWORD}")
    except ValueError:
        record = logging.LogRecord("any", logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
    text = formatter.format(record)
    assert "cannot log in with ***" in text
    assert PASSWORD not in text


LOGGERS = (
    "tundp.store",
    "tundp",
    "asyncio",
    "aiohttp",
    "h2",
    "hpack",
    "hpack.table",
    "urllib3.pool",
    "etcd.x",
)


def logged(level: int, modules: str) -> tuple[list[str], set[tuple[str, str]]]:
    """What set_up refuses, and (logger, severity) of every line that comes out.

    Each logger logs at each severity, in a process of its own: levels are the process's.
    """
    program = f"""
import logging
from tundp.daemon import logs
print(logs.set_up({level}, {modules!r}))
for name in {LOGGERS!r}:
    for severity in ("DEBUG", "INFO", "WARNING", "ERROR"):
        logging.getLogger(name).log(getattr(logging, severity), "line %s %s", name, severity)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    words = [line.split() for line in done.stderr.splitlines()]
    refused: list[str] = ast.literal_eval(done.stdout)
    return refused, {(name, severity) for *_, name, severity in words}


def lines(level: int, modules: str = "") -> set[tuple[str, str]]:
    return logged(level, modules)[1]


@pytest.mark.parametrize("level", [0, 1, 2, 9])
def test_v_is_about_our_own_loggers(level: int) -> None:
    found = lines(level)
    assert ("tundp.store", "INFO") in found
    assert (("tundp.store", "DEBUG") in found) is (level > 0)
    others = {(name, severity) for name, severity in found if not name.startswith("tundp")}
    assert others == {("asyncio", "WARNING"), ("asyncio", "ERROR")}


def test_errors_only() -> None:
    assert {pair for pair in lines(-1) if pair[0] == "tundp"} == {("tundp", "ERROR")}


def test_vmodule_sets_single_loggers_of_libraries_too() -> None:
    found = lines(0, "tundp.store=1, h2=1,etcd=-1")
    assert ("tundp.store", "DEBUG") in found
    assert ("tundp", "DEBUG") not in found
    assert ("h2", "DEBUG") in found
    assert {severity for name, severity in found if name == "etcd.x"} == {"ERROR"}


@pytest.mark.parametrize("item", ["hpack=1", "hpack.table=1", "=1", "main", "tundp=x", "a=1=2"])
def test_vmodule_that_has_no_effect_is_named(item: str) -> None:
    """hpack shows headers in a coded form, which no pattern of ours finds."""
    refused, found = logged(0, f"{item}, h2=1")
    assert refused == [item]
    assert ("h2", "DEBUG") in found
    assert not [name for name, _ in found if name.startswith("hpack")]


def test_lines_of_one_kind_are_counted_from_the_twentieth_on() -> None:
    now = [100.0]
    repeats = RepeatFilter(clock=lambda: now[0])

    def let_through(template: str, *arguments: object, level: int = logging.INFO) -> str:
        record = logging.LogRecord("tundp.x", level, "", 0, template, arguments, None)
        return record.getMessage() if repeats.filter(record) else ""

    told = [let_through("link %s went down", f"eth{n}") for n in range(1000)]
    assert [text for text in told if text] == [f"link eth{n} went down" for n in range(BURST)]
    assert let_through("link %s went up", "eth0"), "another kind"
    assert let_through("%s: %s", "one", "x"), "the first argument says what"
    for n in range(100):
        let_through("%s: %s", "two", n)
    assert let_through("%s: %s", "one", "x")
    assert let_through("link %s went down", "eth0", level=logging.DEBUG), "asked for"
    now[0] += 60
    assert let_through("link %s went down", "eth1") == (
        "link eth1 went down (and 980 more lines like this since)"
    )
    assert let_through("link %s went down", "eth1") == ""


def test_kinds_without_end_take_no_memory_without_end() -> None:
    repeats = RepeatFilter(clock=lambda: 1.0)
    for n in range(5000):
        assert repeats.filter(logging.LogRecord("x", logging.INFO, "", 0, f"line {n}", (), None))
    assert len(repeats._buckets) <= 1000


def test_whoever_chooses_the_first_argument_does_not_choose_how_much_is_logged() -> None:
    now = [100.0]
    repeats = RepeatFilter(clock=lambda: now[0])

    def passes(text: str) -> bool:
        return repeats.filter(
            logging.LogRecord("tundp.x", logging.ERROR, "", 0, "%s: stop one", (text,), None)
        )

    assert sum(passes(f"subnet {n}") for n in range(20_000)) == logs.ALL_BURST
    now[0] += 60
    assert sum(passes(f"subnet {n}") for n in range(20_000)) == 1
