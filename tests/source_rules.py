"""Rules of the product's source, as functions of a text, so that each can be shown to find fault.

`tests/unit/test_architecture.py` applies them to every file, and to planted offenders.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 450
WHY_ONE_ROOM = "Why one room:"
"""A longer file says behind these words, in its first comment or docstring, why it is one."""
TABLE_LINES = 8
"""A literal of more lines is a table: data, and not counted as a function's code."""

# Whoever calls these, or reads these, talks to the user or ends the process.
_PRINTING = {
    "builtins.print",
    "builtins.exit",
    "builtins.quit",
    "sys.exit",
    "sys.stdout",
    "sys.stderr",
    "sys.__stdout__",
    "sys.__stderr__",
    "os._exit",
    "os.abort",
    "rich.print",
    "rich.get_console",
    "rich.console.Console",
    "builtins.SystemExit",
}
_BUILTINS = {"print", "exit", "quit", "SystemExit"}
_CFFI_NAMES = {"ffi", "lib", "_ffi", "_lib", "CData"}


def imports_of(source: str) -> set[str]:
    """Every module imported, and `module.name` for every name; relative imports as `.x`."""
    found: set[str] = set()
    for node in ast.walk(_parsed(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _is_import_call(node):
            found.update(_texts(node.args[:1]))
    return found


def forbidden_imports(source: str, allowed: set[str]) -> set[str]:
    """The groups of tundp that `source` imports and may not; any relative import is one, too."""
    names = imports_of(source)
    groups = {name.split(".")[1] for name in names if name.startswith("tundp.")}
    return (groups - allowed) | {name for name in names if name.startswith(".")}


def printing(source: str) -> list[str]:
    """Where `source` prints, writes to standard output or error, or ends the process.

    A use of a console counts like a use of `print`: `anything.print(...)`. Naming a type in an
    annotation does not.
    """
    tree = _parsed(source)
    aliases = _aliases(tree)
    skipped = {id(node) for top in _annotations(tree) for node in ast.walk(top)}
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Name | ast.Attribute):
            name = _dotted(node, aliases)
            if name in _PRINTING and isinstance(node.ctx, ast.Load):
                found.append(f"line {node.lineno}: {name.removeprefix('builtins.')}")
        elif isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute) and function.attr == "print":
                found.append(f"line {node.lineno}: .print()")
            elif _dotted(function, aliases) == "os.write" and _is_standard_stream(node):
                found.append(f"line {node.lineno}: os.write")
    return found


def cffi_uses(source: str) -> list[str]:
    """Where `source` touches cffi's objects: an `ffi`, a `lib`, or an extension module."""
    found = []
    for node in ast.walk(_parsed(source)):
        name = node.id if isinstance(node, ast.Name) else None
        name = node.attr if isinstance(node, ast.Attribute) else name
        if name in _CFFI_NAMES:
            assert isinstance(node, ast.Name | ast.Attribute)
            found.append(f"line {node.lineno}: {name}")
    found += [f"imports {name}" for name in imports_of(source) if name.startswith("tundp._")]
    return [each for each in found if not each.startswith("imports tundp.__")]


@dataclass(frozen=True, slots=True)
class Length:
    """One function and its lines of code."""

    name: str
    lines: int


def python_functions(source: str) -> Iterator[Length]:
    """Every function of a Python source: no blank lines, comments, docstrings or tables in it."""
    code = _code_lines(source)
    for qualified, node in _functions(_parsed(source), ""):
        assert node.end_lineno is not None
        lines = code & set(range(node.lineno, node.end_lineno + 1))
        for inner in ast.walk(node):
            if isinstance(inner, ast.List | ast.Tuple | ast.Dict | ast.Set):
                assert inner.end_lineno is not None
                span = range(inner.lineno, inner.end_lineno + 1)
                lines -= set(span) if len(span) > TABLE_LINES else set()
            elif isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                lines -= _docstring_lines(inner)
        yield Length(qualified, len(lines))


def c_functions(source: str) -> Iterator[Length]:
    """Every function of a C source in the kernel's style: its braces stand in the first column.

    Neither they nor its comments and blank lines count.
    """
    text = re.sub(
        r"/\*.*?\*/", lambda found: re.sub(r"[^\n]", " ", found[0]), source, flags=re.DOTALL
    )
    lines = [re.sub(r"//.*", "", line).rstrip() for line in text.split("\n")]
    start = None
    for number, line in enumerate(lines):
        if line == "{":
            start = number
        elif line.startswith("}") and start is not None:
            head = " ".join(lines[max(0, start - 6) : start])
            names = re.findall(r"(\w+)\(", re.split(r"[;}]", head)[-1])
            body = [each for each in lines[start + 1 : number] if each.strip()]
            yield Length(names[0] if names else f"line {start}", len(body))
            start = None


def is_too_long_a_file(source: str) -> bool:
    """Whether a file is long and does not say at its head why it is one."""
    lines = source.split("\n")
    return len(lines) > MAX_FILE_LINES and WHY_ONE_ROOM not in _head(source)


@functools.cache
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)


def _head(source: str) -> str:
    """The docstring of a Python module, or the first comment of a C source."""
    if source.lstrip().startswith("/*"):
        return source[: source.find("*/")]
    return ast.get_docstring(_parsed(source)) or ""


def _functions(
    tree: ast.AST, prefix: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{node.name}", node
            yield from _functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")
        else:
            yield from _functions(node, prefix)


def _code_lines(source: str) -> set[int]:
    found: set[int] = set()
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in nothing:
            found.update(range(token.start[0], token.end[0] + 1))
    return found


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> set[int]:
    if ast.get_docstring(node) is None:
        return set()
    first = node.body[0]
    assert first.end_lineno is not None
    return set(range(first.lineno, first.end_lineno + 1))


def _aliases(tree: ast.AST) -> dict[str, str]:
    """What each imported name, and each builtin of interest, stands for."""
    found = {name: f"builtins.{name}" for name in _BUILTINS}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                found[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def _dotted(node: ast.AST, aliases: dict[str, str]) -> str:
    """`sys.stdout` for that attribute of that module, whatever it was imported as; else ''."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, "")
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value, aliases)
        return f"{base}.{node.attr}" if base else ""
    return ""


def _annotations(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            found = getattr(node, field, None)
            if isinstance(found, ast.AST):
                yield found


def _is_standard_stream(call: ast.Call) -> bool:
    first = call.args[0] if call.args else None
    return isinstance(first, ast.Constant) and first.value in (1, 2)


def _is_import_call(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    name = call.func.id if isinstance(call.func, ast.Name) else name
    return name in ("import_module", "__import__")


def _texts(nodes: list[ast.expr]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
