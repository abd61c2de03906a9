"""Holds the arrows of docs/architecture.md: who may import whom, and nobody the other way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tundp

PACKAGE = Path(tundp.__file__).parent

# Lowest first. A module may import from its own group, and from the groups named for it.
BOTTOM = {"errors", "blocking", "backoff", "choices", "files", "finding", "instance"}
MAY_IMPORT = {
    "errors": set(),
    "blocking": set(),
    "backoff": set(),
    "choices": set(),
    "files": set(),
    "finding": set(),
    "instance": set(),
    "layout": set(),
    "wire": {"choices", "errors"},
    "lease": {"errors"},
    "settings": {"choices", "errors", "instance", "wire"},
    "store": {"lease", *BOTTOM},
    "linux": BOTTOM,
    "engine": {"lease", "wire", "linux", *BOTTOM},
    "subnet": {"store", "lease", *BOTTOM},
    "backend": {"engine", "lease", "wire", "linux", *BOTTOM},
    "observe": {"engine", "lease", "linux", "store", "wire", *BOTTOM},
    "admin": {"observe", *BOTTOM},
    "show": {"layout", "linux", "observe", "wire", *BOTTOM},
    "docker_opts": {"linux", "settings", *BOTTOM},
    "daemon": {
        "admin",
        "backend",
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
    "lab": {"admin", "linux", "observe", "wire", *BOTTOM},
    "bench": {"engine", "lab", "layout", "linux", "observe", "wire", *BOTTOM},
    "demo": {"engine", "lab", "layout", "lease", "observe", "show", *BOTTOM},
    "cli": {
        "admin",
        "bench",
        "daemon",
        "engine",
        "demo",
        "docker_opts",
        "linux",
        "observe",
        "settings",
        "show",
        *BOTTOM,
    },
    "__main__": {"cli"},
}
SANS_IO = {"asyncio", "socket", "os", "time", "threading", "subprocess", "select", "pathlib"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def group_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    group = group_of(path)
    if group == "__init__":
        return
    inside = {name.split(".")[1] for name in imports_of(path) if name.startswith("tundp.")}
    allowed = MAY_IMPORT[group] | {group, "__version__"}
    allowed |= {"engine": {"_native"}, "bench": {"_traffic"}}.get(group, set())
    assert inside <= allowed, f"{path.name} imports {inside - allowed}"


@pytest.mark.parametrize(
    "path",
    [path for path in modules() if group_of(path) in ("wire", "lease")],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_wire_and_lease_do_no_io(path):
    roots = {name.split(".")[0] for name in imports_of(path)}
    assert not roots & SANS_IO


def test_only_native_py_touches_the_extension():
    users = {path.parent for path in modules() if "tundp._native" in imports_of(path)}
    assert users == {PACKAGE / "engine" / "native"}


def test_only_cli_prints_and_exits():
    for path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {
            node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        if group_of(path) != "cli":
            assert not called & {"print", "exit", "quit"}, path


def test_the_rules_themselves_can_fail():
    assert group_of(PACKAGE / "wire" / "ip.py") == "wire"
    assert "tundp.wire.checksum" in imports_of(PACKAGE / "wire" / "ip.py")


def test_public_names():
    assert tundp.__all__ == ["__version__"]
