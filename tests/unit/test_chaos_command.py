"""The command line of `tundp chaos`, and its request: what is taken, and what is refused how."""

from __future__ import annotations

from typing import Any

import pytest

from tundp.cli.chaos import Delay, parse_delay, parse_share
from tundp.cli.program import main
from tundp.errors import Unsupported
from tundp.observe.chaos import NOT_AGREED, Order, read_order
from tundp.wire.impair import Impairment

ORDER = Order(peer="10.5.2.0/24", impairment=Impairment(loss=0.01), for_s=60, seed=7)


def test_shares_and_delays() -> None:
    assert [parse_share(text) for text in ("1%", "0.1%", "100%", "0%")] == [0.01, 0.001, 1, 0]
    assert parse_delay("20ms") == Delay(0.02, 0.0)
    assert parse_delay("20ms+-5ms") == parse_delay("20ms±5ms") == Delay(0.02, 0.005)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "PEER is missing"),
        (["--loss=1%", "--yes-break-traffic"], "PEER is missing"),
        (["10.5.2.0/24", "--for=60s", "--yes-break-traffic"], "nothing to impair: --loss"),
        (["10.5.2.0/24", "--loss=1%", "--yes-break-traffic"], "--for is missing"),
        (["10.5.2.0/24", "--loss=1%", "--for=60s"], NOT_AGREED),
        (["10.5.2.0/24", "--loss=1", "--for=1s"], "is no share of the packets, such as 1%"),
        (["10.5.2.0/24", "--loss=101%", "--for=1s"], "is no share of the packets"),
        (["10.5.2.0/24", "--delay=5", "--for=61m"], "is out of range: at most 1h"),
        (["10.5.2.0/24", "--delay=11s"], "is out of range: at most 10s"),
        (["10.5.2.0/24", "--delay=5ms+-6ms"], "varies by more than the delay itself"),
        (["10.5.2.0/24", "--delay=+-6ms"], "is no delay, such as 20ms"),
        (["10.5.2.0/24", "--mtu=67"], "is out of range: 68 to 65507 bytes"),
        (["10.5.2.0/24", "--seed=-1"], "is not a whole number"),
    ],
)
def test_wrong_usage(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chaos", *arguments]) == 2
    assert error in capsys.readouterr().err


def test_no_daemon(capsys: pytest.CaptureFixture[str]) -> None:
    socket = "--admin-socket=/nonexistent/admin.sock"
    for words in (
        ["list"],
        ["stop"],
        ["10.5.2.0/24", "--loss=1%", "--for=60s", "--yes-break-traffic"],
    ):
        assert main(["chaos", *words, socket]) == 1
        assert "no daemon answers on /nonexistent/admin.sock" in capsys.readouterr().err


def test_a_request_is_read_as_it_was_written() -> None:
    assert read_order(ORDER.to_json()) == ORDER


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"yes_break_traffic": False}, "on purpose"),
        ({"yes_break_traffic": 1}, "on purpose"),
        ({"peer": None}, "peer is missing"),
        ({"peer": ["all"]}, "peer is missing"),
        ({"for_s": 3601}, "for_s is out of range"),
        ({"for_s": 0}, "for_s is out of range"),
        ({"for_s": float("nan")}, "for_s is out of range"),
        ({"for_s": True}, "for_s is out of range"),
        ({"for_s": "60"}, "for_s is out of range"),
        ({"seed": 1 << 32}, "seed is out of range"),
        ({"seed": 1.5}, "seed is out of range"),
        ({"impairment": None}, "impairment is missing"),
        ({"impairment": {"loss": 2}}, "loss is a share of the packets"),
    ],
)
def test_a_request_that_is_refused(change: dict[str, Any], error: str) -> None:
    with pytest.raises(Unsupported, match=error):
        read_order(ORDER.to_json() | change)


@pytest.mark.parametrize("document", [None, [], "x", 1, {}])
def test_what_is_no_request(document: Any) -> None:
    with pytest.raises(Unsupported):
        read_order(document)
