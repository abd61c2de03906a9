"""Kernel constants against the kernel headers the C module is built with."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from tundp.linux import uapi

SOURCE = Path(uapi.__file__)
SPELT_OTHERWISE = {"LINUX_CAPABILITY_VERSION_3": "_LINUX_CAPABILITY_VERSION_3"}
NOT_IN_UAPI = {"SOL_PACKET", "SOL_NETLINK"}
"""linux/socket.h of the kernel itself; libc's sys/socket.h repeats them."""
NEW = {"TUN_F_USO4", "TUN_F_USO6", "BPF_TCX_INGRESS", "BPF_TCX_EGRESS"}
"""Younger than the headers of a supported distribution may be."""


def sections() -> dict[str, list[str]]:
    """Header to the names below its comment."""
    found: dict[str, list[str]] = {}
    header = ""
    for line in SOURCE.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"# ([\w/-]+\.h)", line):
            header = match[1]
        elif match := re.match(r"([A-Z][A-Z0-9_]*): Final", line):
            found.setdefault(header, []).append(match[1])
    return found


def test_every_constant_is_that_of_its_header(tmp_path: Path) -> None:
    source = tmp_path / "check.c"
    lines = ["#include <stdio.h>", "#include <sys/socket.h>", "#include <sys/ioctl.h>"]
    names = []
    for header, constants in sections().items():
        assert header, f"{constants} stand under no header"
        if header != "linux/socket.h":
            # linux/if.h and linux/in.h agree with libc's own headers on who defines what.
            lines.append(f"#include <{header}>")
        names += constants
    assert len(names) > 60

    def check(left: list[str]) -> str:
        body = [
            f'    printf("%s %llu\\n", "{name}", (unsigned long long)(unsigned)'
            f"({SPELT_OTHERWISE.get(name, name)}));"
            for name in left
        ]
        source.write_text("\n".join([*lines, "int main(void) {", *body, "}", ""]))
        done = subprocess.run(
            ["gcc", "-w", "-o", str(tmp_path / "check"), str(source)],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"LC_ALL": "C"},
        )
        return done.stderr

    complaints = check(names)
    absent = {name for name in names if f"'{name}' undeclared" in complaints}
    assert absent <= NEW, complaints
    present = [name for name in names if name not in absent]
    assert check(present) == ""
    output = subprocess.run(
        [str(tmp_path / "check")], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    found = {name: int(value) for name, value in (line.split() for line in output.splitlines())}
    assert found == {name: getattr(uapi, name) for name in present}


def test_every_constant_is_used() -> None:
    package = SOURCE.parents[1]
    text = "".join(
        path.read_text(encoding="utf-8") for path in package.rglob("*.py") if path != SOURCE
    )
    unused = {
        name
        for names in sections().values()
        for name in names
        if not re.search(rf"\b{name}\b", text)
    }
    assert unused == set()
