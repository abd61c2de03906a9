"""Keeps the C sources free of circles, as test_architecture keeps the Python modules.

Two graphs: which file includes which, and which source file calls functions of which. A call
counts where it stands in a function's body; inline functions of a header count for whoever
includes it.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "native" / "src"
INCLUDE = Path(__file__).parents[2] / "native" / "include"

Graph = dict[str, set[str]]


def without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)


def bodies(text: str) -> str:
    """What stands between braces."""
    found, depth = [], 0
    for char in without_comments(text):
        depth -= char == "}"
        if depth:
            found.append(char)
        depth += char == "{"
        if char == "}" and not depth:
            found.append("\n")
    return "".join(found)


def defined(text: str) -> set[str]:
    """Functions a source file offers to others: defined in it, not static."""
    pattern = r"^(?!static\b|typedef\b|#)[A-Za-z][\w \*]*?\b(\w+)\([^;{}]*\)\s*\{"
    return set(re.findall(pattern, without_comments(text), flags=re.MULTILINE))


def included(text: str) -> set[str]:
    return set(re.findall(r'^#include "([\w.]+)"', text, flags=re.MULTILINE))


def files(sources: Path) -> dict[str, str]:
    paths = [*sources.glob("*.[ch]"), *INCLUDE.glob("*.h")]
    return {path.name: path.read_text() for path in paths}


def includes(texts: dict[str, str]) -> Graph:
    return {name: included(text) for name, text in texts.items()}


def reach(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        for name in graph.get(todo.pop(), set()) - seen:
            seen.add(name)
            todo.append(name)
    return seen


def calls(texts: dict[str, str]) -> Graph:
    sources = {name: text for name, text in texts.items() if name.endswith(".c")}
    home = {function: name for name, text in sources.items() for function in defined(text)}
    graph = includes(texts)
    found: Graph = {}
    for name, text in sources.items():
        whole = bodies(text) + "".join(bodies(texts[each]) for each in reach(graph, name))
        called = set(re.findall(r"\b(\w+)\s*\(", whole))
        found[name] = {home[function] for function in called & home.keys()} - {name}
    return found


def in_circles(graph: Graph) -> set[str]:
    return {name for name in graph if name in reach(graph, name)}


def test_no_file_includes_itself() -> None:
    assert in_circles(includes(files(SOURCES))) == set()


def test_no_source_file_calls_itself_through_others() -> None:
    graph = calls(files(SOURCES))
    assert in_circles(graph) == set()
    # What it looks for is there to be found.
    assert graph["batch.c"] >= {"batch_encap.c", "batch_decap.c", "publish.c"}
    assert graph["train.c"] >= {"single.c", "count.c"}


@pytest.mark.parametrize(
    ("file", "line", "circle"),
    [
        ("count.c", "void oops(struct batch *b) { batch_encap_init(b); }", "count.c"),
        ("fib.h", "static inline void oops(void) { tundp_batch_len(); }", "batch.c"),
    ],
)
def test_a_circle_of_calls_is_seen(tmp_path: Path, file: str, line: str, circle: str) -> None:
    sources = tmp_path / "src"
    shutil.copytree(SOURCES, sources)
    with (sources / file).open("a") as text:
        text.write(f"\n{line}\n")
    assert circle in in_circles(calls(files(sources)))


def test_a_circle_of_includes_is_seen(tmp_path: Path) -> None:
    sources = tmp_path / "src"
    shutil.copytree(SOURCES, sources)
    (sources / "count.h").write_text('#include "batch.h"\n')
    assert {"batch.h", "single.h", "count.h"} <= in_circles(includes(files(sources)))


@pytest.mark.parametrize("header", ["ip.h", "fib.h", "transport.h"])
def test_header_only(header: str) -> None:
    # Other programs (a BPF object) may include these without linking anything of ours.
    texts = files(SOURCES)
    homes = calls(texts | {"user.c": f'#include "{header}"\n'})
    assert homes["user.c"] == set()
