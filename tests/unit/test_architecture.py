"""Holds the house of docs/architecture.md: who may import whom, who prints, how long a room is."""

from __future__ import annotations

from pathlib import Path

import pytest

import tundp
from tests.source_rules import (
    MAX_FUNCTION_LINES,
    WHY_ONE_ROOM,
    c_functions,
    cffi_uses,
    forbidden_imports,
    imports_of,
    is_too_long_a_file,
    printing,
    python_functions,
)

PACKAGE = Path(tundp.__file__).parent
NATIVE = PACKAGE.parent / "native"

# Lowest first. A module may import from its own group, and from the groups named for it.
BOTTOM = {
    *("errors", "blocking", "backoff", "choices", "collector", "files", "finding", "instance"),
    "printable",
}
MAY_IMPORT = {
    "errors": set(),
    "blocking": {"errors"},
    "backoff": set(),
    "choices": set(),
    "collector": set(),
    "files": set(),
    "finding": {"printable"},
    "instance": set(),
    "hold": {"linux"},
    "layout": {"printable"},
    "printable": set(),
    "wire": {"choices", "errors"},
    "lease": {"errors", "printable"},
    "settings": {"choices", "errors", "files", "instance", "wire"},
    "store": {"lease", *BOTTOM},
    "linux": BOTTOM,
    "engine": {"lease", "wire", "linux", *BOTTOM},
    "early": {"__init__", "engine", "linux"},
    "subnet": {"store", "lease", *BOTTOM},
    "backend": {"engine", "lease", "wire", "linux", *BOTTOM},
    "observe": {"engine", "lease", "linux", "store", "wire", *BOTTOM},
    "admin": {"admin_peers", "engine", "linux", "observe", *BOTTOM},
    "admin_chaos": {"admin", "observe", *BOTTOM},
    "admin_handover": {"admin", "observe", *BOTTOM},
    "admin_peers": {"observe", *BOTTOM},
    "show": {"layout", "linux", "observe", "show_chaos", "wire", *BOTTOM},
    "show_chaos": {"layout", "observe", *BOTTOM},
    "show_drops": {"layout", "observe", "show_chaos", "wire", *BOTTOM},
    "show_leases": {"layout", "observe", *BOTTOM},
    "show_matrix": {"layout", "observe", "show_ping", *BOTTOM},
    "show_ping": {"layout", "observe", *BOTTOM},
    "top": {"admin", "layout", "linux", "observe", "wire", *BOTTOM},
    "docker_opts": {"linux", "settings", *BOTTOM},
    "daemon": {
        "admin",
        "admin_chaos",
        "admin_handover",
        "backend",
        "early",
        "engine",
        "observe",
        "settings",
        "subnet",
        "lease",
        "linux",
        "store",
        "wire",
        *BOTTOM,
    },
    "doctor": {
        "admin",
        "daemon",
        "engine",
        "layout",
        "lease",
        "linux",
        "observe",
        "settings",
        "store",
        "wire",
        *BOTTOM,
    },
    "bugreport": {
        "admin",
        "daemon",
        "doctor",
        "engine",
        "lease",
        "linux",
        "observe",
        "settings",
        "store",
        "wire",
        *BOTTOM,
    },
    "lab": {"admin", "linux", "observe", "wire", *BOTTOM},
    "bench": {"engine", "lab", "layout", "linux", "observe", "wire", *BOTTOM},
    "demo": {"backend", "engine", "lab", "layout", "lease", "observe", "show", *BOTTOM},
    "cli": {
        "wire",
        "admin",
        "admin_chaos",
        "admin_handover",
        "bench",
        "bugreport",
        "daemon",
        "early",
        "engine",
        "demo",
        "docker_opts",
        "doctor",
        "linux",
        "observe",
        "settings",
        "show",
        "show_chaos",
        "show_drops",
        "show_leases",
        "show_matrix",
        "show_ping",
        "top",
        *BOTTOM,
    },
    "__main__": {"cli"},
}
SANS_IO = {"asyncio", "socket", "os", "time", "threading", "subprocess", "select", "pathlib"}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if not path.name.endswith("_pb2.py"))


def c_sources() -> list[Path]:
    return sorted(NATIVE.rglob("*.[ch]"))


def name_of(path: Path) -> str:
    """`wire/ip.py`, or `native/src/fib.c`."""
    return str(path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else PACKAGE.parent))


def group_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def allowed_for(group: str) -> set[str]:
    own = {"engine": {"_native"}, "lab": {"_traffic"}}.get(group, set())
    return MAY_IMPORT[group] | {group, "__version__"} | own


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_arrows_point_down(path: Path) -> None:
    group = group_of(path)
    if group != "__init__":
        assert forbidden_imports(text_of(path), allowed_for(group)) == set()


def test_every_group_there_is_has_its_arrows() -> None:
    assert {group_of(path) for path in modules()} <= {*MAY_IMPORT, "__init__"}


@pytest.mark.parametrize(
    "path", [path for path in modules() if group_of(path) in ("wire", "lease")], ids=name_of
)
def test_wire_and_lease_do_no_io(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports_of(text_of(path))}
    assert not roots & SANS_IO


def test_only_the_native_engine_sees_cffi() -> None:
    users = {path.parent for path in modules() if cffi_uses(text_of(path))}
    # The generators of traffic have an extension module of their own.
    assert users == {PACKAGE / "engine" / "native", PACKAGE / "lab"}
    labs = [path for path in modules() if group_of(path) == "lab" and cffi_uses(text_of(path))]
    assert [name_of(path) for path in labs] == ["lab/generators.py"]


def test_only_the_command_line_prints_and_exits() -> None:
    found = {name_of(path): printing(text_of(path)) for path in modules()}
    offenders = {
        name: where
        for name, where in found.items()
        # tundp/hold is a program of its own.
        if where and not name.startswith(("cli/", "hold/", "__main__.py"))
    }
    assert offenders == {}


def test_no_function_is_longer_than_a_screen() -> None:
    lengths = {
        f"{name_of(path)}:{each.name}": each.lines
        for path in (*modules(), *c_sources())
        for each in (python_functions if path.suffix == ".py" else c_functions)(text_of(path))
    }
    assert len(lengths) > 1000, "functions are found at all"
    long = {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES}
    assert long == {}


def test_a_long_file_says_why_it_is_one() -> None:
    long = {
        name_of(path) for path in (*modules(), *c_sources()) if is_too_long_a_file(text_of(path))
    }
    assert long == set(), f"split it, or say {WHY_ONE_ROOM!r} at its head"


def test_public_names() -> None:
    assert tundp.__all__ == ["__version__"]


# The rules themselves: each finds a planted offender, and nothing in its innocent likeness


@pytest.mark.parametrize(
    ("group", "source", "refused"),
    [
        ("wire", "import tundp.linux.tun", {"linux"}),
        ("wire", "from tundp.linux import tun", {"linux"}),
        ("wire", "from tundp import daemon", {"daemon"}),
        ("lease", "def late():\n    from tundp.store.base import Store", {"store"}),
        ("store", "if TYPE_CHECKING:\n    from tundp.cli import main", {"cli"}),
        ("store", "importlib.import_module('tundp.engine.native')", {"engine"}),
        ("linux", "from tundp import _native", {"_native"}),
        ("wire", "from . import ip", {".", "..ip"}),
        ("daemon", "from tundp.store.base import Store\nfrom tundp import errors", set()),
        ("engine", "from tundp import _native", set()),
        ("cli", "import asyncio, tundp", set()),
    ],
)
def test_a_forbidden_import_is_refused(group: str, source: str, refused: set[str]) -> None:
    assert forbidden_imports(source, allowed_for(group)) == refused


@pytest.mark.parametrize(
    "source",
    [
        "print(1)",
        "from builtins import print as say\nsay(1)",
        "list(map(print, [1]))",
        "exit()",
        "raise SystemExit(2)",
        "import sys\nsys.exit(1)",
        "from sys import exit as leave\nleave()",
        "import sys as system\nsystem.stdout.write('x')",
        "from sys import stderr\nstderr.write('x')",
        "import sys\nout = sys.stdout",
        "import os\nos._exit(1)",
        "import os\nos.write(2, b'x')",
        "from rich.console import Console\nConsole().rule()",
        "import rich.console\nrich.console.Console()",
        "import rich\nrich.print(1)",
        "def show(console: object):\n    console.print(1)",
    ],
)
def test_printing_and_exiting_is_seen(source: str) -> None:
    assert printing(source)


@pytest.mark.parametrize(
    "source",
    [
        "from rich.console import Console\ndef show(console: Console) -> Console: ...",
        "import sys\nsys.stdin.read()\nsys.argv",
        "import os\nos.write(fd, b'x')",
        "log.info('print')",
        "self.exit()",
        "try:\n    run()\nexcept KeyboardInterrupt:\n    pass",
    ],
)
def test_what_does_not_print_is_not_called_so(source: str) -> None:
    assert printing(source) == []


@pytest.mark.parametrize(
    "source",
    ["from tundp import _native", "import tundp._native", "worker._ffi.new('x')", "lib.run()"],
)
def test_cffi_is_seen(source: str) -> None:
    assert cffi_uses(source)
    assert not cffi_uses("from tundp import __version__\nlibrary.run(offi)")


def test_function_lengths_leave_out_what_is_no_code() -> None:
    body = "    x = 1\n" * 40
    table = "    t = [\n" + "        1,\n" * 30 + "    ]\n"
    source = f'def f():\n    """One.\n\n    Two.\n    """\n\n    # why\n{body}{table}'
    assert [(each.name, each.lines) for each in python_functions(source)] == [("f", 41)]
    nested = "class A:\n    async def f(self):\n        def g():\n            pass\n"
    assert [each.name for each in python_functions(nested)] == ["A.f", "A.f.g"]
    c = "/*\n{\n*/\nstatic int\nf(int a,\n  int b)\n{\n\tg();\n\n\t/* why */\n\th();\n}\n"
    assert [(each.name, each.lines) for each in c_functions(c)] == [("f", 2)]


def test_a_long_file_is_seen_unless_it_says_why() -> None:
    code = "x = 1\n" * 450
    assert is_too_long_a_file(code)
    assert not is_too_long_a_file(code[:-6])
    assert not is_too_long_a_file(f'"""One.\n\nWhy one room: it is a table.\n"""\n{code}')
    assert is_too_long_a_file(f'"""One."""\n# Why one room: not at its head\n{code}')
    c = "int x;\n" * 451
    assert is_too_long_a_file(f"/* One. */\n{c}")
    assert not is_too_long_a_file(f"/* One. Why one room: it is a table. */\n{c}")
