"""`tundp matrix`: what all peers come to, the grid and its folding, metrics, and how it looks.

The golden files are what people and programs are shown; they change only on purpose.
"""

from __future__ import annotations

import io
import json
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.json_schema import validate
from tundp.cli import matrix as command
from tundp.doctor.hello import read_reach
from tundp.errors import ConfigError
from tundp.observe import matrix_metrics, schema
from tundp.observe.matrix import (
    Cell,
    Matrix,
    MatrixNode,
    MatrixOutcome,
    MatrixRow,
    Reached,
    judged,
)
from tundp.observe.ping import Answer
from tundp.show_matrix import FOLDED, matrix_parts

GOLDEN = Path(__file__).with_name("golden")
SCHEMA = json.loads(Path(schema.__file__).with_name("matrix.schema.json").read_text())
NODE = IPv4Network("10.5.1.0/24")
HERE = IPv4Address("192.0.2.1")


def subnet(number: int) -> IPv4Network:
    return IPv4Network(f"10.5.{number}.0/24")


def node(number: int, **changes: Any) -> MatrixNode:
    """A peer that answers in every way, but for the changes."""
    values: dict[str, Any] = {
        "subnet": subnet(number),
        "public_ip": IPv4Address(f"192.0.2.{number}"),
        "port": 8285,
        "host": f"n{number}",
        "is_asked": True,
        "underlay_rtt_ms": 0.11,
        "overlay_rtt_ms": 0.3 + number / 100,
        "sent": 5,
        "received": 5,
        "path_mtu": 1472,
        "control": Answer.ANSWERED,
        "implementation": "tundp 0.2.0",
    }
    return MatrixNode(**(values | changes))


def dead(number: int, **changes: Any) -> MatrixNode:
    """One that answers nothing."""
    return node(
        number,
        **(
            {
                "underlay_rtt_ms": None,
                "overlay_rtt_ms": None,
                "received": 0,
                "path_mtu": None,
                "control": Answer.SILENT,
                "implementation": "",
            }
            | changes
        ),
    )


def row(number: int, **cells: Cell) -> MatrixRow:
    """What a node says of others: `n3=Cell.HEARD`."""
    return MatrixRow(
        subnet=subnet(number),
        is_told=True,
        reached={
            str(subnet(int(name[1:]))): Reached(
                cell=cell, rtt_ms=0.5 if cell is Cell.HEARD else None
            )
            for name, cell in cells.items()
        },
    )


def matrix(peers: list[MatrixNode], rows: list[MatrixRow], **changes: Any) -> Matrix:
    return judged(NODE, HERE, peers, rows, took_s=1.25, **changes)


def example() -> Matrix:
    return matrix(
        [
            node(2),
            node(3, received=4),
            node(4, control=Answer.STOCK, implementation="stock flanneld"),
            dead(5),
            node(6, is_full_size_lost=True),
        ],
        [
            row(2, n1=Cell.HEARD, n3=Cell.HEARD, n5=Cell.SILENT),
            row(3, n1=Cell.HEARD, n2=Cell.SILENT),
            MatrixRow(subnet=subnet(4), is_told=False, why_not="does not tell (stock flanneld)"),
            MatrixRow(subnet=subnet(5), is_told=False, why_not="does not answer"),
            row(6, n1=Cell.HEARD, n2=Cell.UNKNOWN),
        ],
        notes=["1 of 6 peers not asked: no time left after 30 s (--timeout)"],
    )


def printed(found: Matrix, *, is_terminal: bool = False, width: int = 80) -> str:
    out = io.StringIO()
    console = Console(
        file=out,
        force_terminal=is_terminal,
        width=width,
        highlight=False,
        color_system="standard" if is_terminal else None,
    )
    for part in matrix_parts(found):
        console.print(part, crop=False)
    return out.getvalue()


# What it comes to


@pytest.mark.parametrize(
    ("peers", "rows", "outcome", "words"),
    [
        ([node(2)], [row(2, n1=Cell.HEARD)], MatrixOutcome.OK, ""),
        ([], [], MatrixOutcome.OK, ""),
        (
            [node(2), dead(3)],
            [],
            MatrixOutcome.SILENT,
            "10.5.3.0/24 at 192.0.2.3 does not answer, its host does not answer pings either",
        ),
        ([dead(3, underlay_rtt_ms=0.1)], [], MatrixOutcome.SILENT, "its host answers pings"),
        (
            [dead(3, is_heard=True)],
            [],
            MatrixOutcome.SILENT,
            "one way: datagrams of 10.5.3.0/24 at 192.0.2.3 arrive here",
        ),
        ([node(2, received=3)], [], MatrixOutcome.PARTLY, "2 of 5 echo requests lost"),
        (
            [node(2, is_full_size_lost=True)],
            [],
            MatrixOutcome.PARTLY,
            "answers, but no packets of 1472 bytes",
        ),
        ([node(2), node(3, is_asked=False)], [], MatrixOutcome.PARTLY, ""),
        (
            [node(2), node(3)],
            [row(2, n3=Cell.HEARD), row(3, n2=Cell.SILENT)],
            MatrixOutcome.PARTLY,
            "one way: 10.5.2.0/24 hears 10.5.3.0/24, but 10.5.3.0/24 does not hear 10.5.2.0/24:"
            " datagrams from 192.0.2.2 to 192.0.2.3 are lost",
        ),
        (
            [node(2), node(3)],
            [row(2, n3=Cell.SILENT), row(3, n2=Cell.SILENT)],
            MatrixOutcome.PARTLY,
            "10.5.2.0/24 and 10.5.3.0/24 do not hear each other",
        ),
        (
            [node(2), node(3)],
            [row(2, n3=Cell.SILENT)],
            MatrixOutcome.PARTLY,
            "10.5.2.0/24 does not hear 10.5.3.0/24: on 192.0.2.2: tundp ping 192.0.2.3",
        ),
        (
            # We reach it, and it says it does not hear us.
            [node(2)],
            [row(2, n1=Cell.SILENT)],
            MatrixOutcome.PARTLY,
            "one way: 10.5.1.0/24 hears 10.5.2.0/24, but 10.5.2.0/24 does not hear 10.5.1.0/24",
        ),
    ],
)
def test_what_all_peers_come_to(
    peers: list[MatrixNode], rows: list[MatrixRow], outcome: MatrixOutcome, words: str
) -> None:
    found = matrix(peers, rows)
    assert found.outcome is outcome
    said = " | ".join(found.sentences)
    assert words in said
    assert len(found.sentences) == bool(words), said


def test_the_worst_comes_first() -> None:
    found = matrix([node(2), node(3, received=1), dead(9), node(4, is_asked=False)], [])
    assert [each.subnet for each in found.peers] == [subnet(9), subnet(4), subnet(3), subnet(2)]


def test_a_pair_is_named_once() -> None:
    numbers = range(2, 6)
    rows = [row(one, **{f"n{each}": Cell.SILENT for each in numbers}) for one in numbers]
    said = matrix([node(each) for each in numbers], rows).sentences
    assert len([each for each in said if "10.5.2.0/24 and 10.5.3.0/24" in each]) == 1


# How it looks


def test_what_a_peer_says_of_subnets_without_a_lease_is_not_believed() -> None:
    strange = {f"203.0.{number}.0/24": Reached(cell=Cell.SILENT) for number in range(200)}
    told = {str(NODE): Reached(cell=Cell.HEARD), **strange}
    liar = MatrixRow(subnet=subnet(2), is_told=True, reached=told)
    found = matrix([node(2), node(3)], [liar, row(3)])
    assert found.sentences == []
    assert found.outcome is MatrixOutcome.OK
    assert [list(each.reached) for each in found.rows[1:]] == [[str(NODE)], []]


def test_the_tables_in_a_pipe_are_the_golden_ones() -> None:
    text = printed(example())
    assert text == (GOLDEN / "matrix-pipe.txt").read_text(encoding="utf-8")
    assert "\x1b" not in text


def test_the_tables_on_a_terminal_are_the_golden_ones() -> None:
    text = printed(example(), is_terminal=True)
    assert text == (GOLDEN / "matrix-terminal.txt").read_text(encoding="utf-8")
    assert "\x1b" in text


def test_its_json_is_the_golden_document_and_fits_its_schema() -> None:
    golden = json.loads((GOLDEN / "matrix.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(example().to_json())) == golden
    validate(golden, SCHEMA)
    assert SCHEMA["properties"].keys() == golden.keys()
    assert Matrix.from_json(golden) == Matrix.from_json(example().to_json())


def test_a_large_grid_has_those_with_trouble_only_and_says_so() -> None:
    peers = [node(each) for each in range(2, FOLDED + 10)]
    rows = [row(each, n1=Cell.HEARD) for each in range(2, FOLDED + 8)]
    rows += [row(FOLDED + 8, n49=Cell.SILENT), row(FOLDED + 9)]
    text = printed(matrix(peers, rows))
    assert f"{FOLDED + 9} nodes: the grid has the 2 with trouble, without 47 others" in text
    grid = text[text.index("from \\ to") :].splitlines()
    assert grid[0].split() == ["from", "\\", "to", "48", "49"]
    assert [line.split()[1] for line in grid[2:4]] == ["10.5.48.0/24", "10.5.49.0/24"]
    assert grid[2].split()[2:] == ["-", "x"]
    healthy = printed(matrix(peers, [row(each) for each in range(2, FOLDED + 10)]))
    assert "the 0 with trouble" in healthy
    assert "from \\ to" not in healthy


# Metrics


def test_metrics_are_those_of_the_worst_peers_and_of_all_in_sum() -> None:
    text = matrix_metrics.text(example(), 2)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert 'tundp_matrix_peers{state="answers"} 4.0' in lines
    assert 'tundp_matrix_peers{state="silent"} 1.0' in lines
    assert 'tundp_matrix_pairs{state="silent"} 3.0' in lines
    assert 'tundp_matrix_peer_reached{peer="192.0.2.5"} 0.0' in lines
    assert {line.split("peer=")[1][:11] for line in lines if "peer=" in line} == {
        '"192.0.2.5"',
        '"192.0.2.6"',
    }
    assert not [line for line in matrix_metrics.text(example(), 0).splitlines() if "peer=" in line]
    assert "tundp_matrix_seconds 1.25" in lines


# What a peer says


def test_a_page_of_a_peers_view_is_read() -> None:
    entries = [
        {"subnet": "10.5.1.0/24", "state": "answers", "rtt_s": 0.0005, "path_mtu": 1472},
        {"subnet": "10.5.3.0/24", "state": "silent", "rtt_s": None, "path_mtu": None},
        {"subnet": "10.5.4.0/24", "state": "a newer word"},
        {"subnet": "10.5.6.0/24", "state": None},
        {"subnet": "nonsense"},
        7,
    ]
    found = read_reach({"peers": entries, "total": 5})
    assert found == {
        "10.5.1.0/24": Reached(cell=Cell.HEARD, rtt_ms=0.5, path_mtu=1472),
        "10.5.3.0/24": Reached(cell=Cell.SILENT),
        "10.5.4.0/24": Reached(cell=Cell.UNKNOWN),
        "10.5.6.0/24": Reached(cell=Cell.UNKNOWN),
    }


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.sampled_from(["peers", "subnet", "state", "rtt_s"]), inner)
        ),
    ).filter(lambda value: isinstance(value, dict))
)
def test_a_strange_page_is_no_error(fields: dict[str, Any]) -> None:
    assert isinstance(read_reach(fields), dict)


# The command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-c", "0"], "out of range"),
        (["-i", "5ms"], "a flood"),
        (["--timeout", "0"], "no time above zero"),
        (["-o", "yaml"], "is not one of text, json, metrics"),
        (["192.0.2.2"], "192.0.2.2"),
    ],
)
def test_wrong_usage_is_named(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        command.COMMAND.main(arguments)
    assert words in str(raised.value)
