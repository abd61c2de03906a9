"""Instructions as RFC 9669 lays them out, the kernel's types, and its functions by address."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from tundp.errors import PlatformError, Unsupported
from tundp.linux import bpf_program
from tundp.linux.bpf_program import FP, R0, R1, R2, R3, R6, R8, Assembler
from tundp.linux.btf import Btf
from tundp.linux.kallsyms import functions_of


@pytest.mark.skipif(sys.byteorder != "little", reason="the bytes are those of a little-endian host")
def test_instructions_are_those_of_the_rfc() -> None:
    code = Assembler()
    code.move(R6, R1)
    code.load(R2, R6, 16, 8)
    code.if_equal(R2, -1, "out")
    code.store(FP, -8, R2, 4)
    code.store_value(R8, 28, 7, 2)
    code.and_32(R3, 0xFFFF0000)
    code.map(R1, 5)
    code.call(131)
    code.if_zero(R0, "out")
    code.atomic_add(R0, 0, R1)
    code.label("out")
    code.set(R0, 0)
    code.exit()
    assert code.code().hex(" ", 8).split() == [
        "bf16000000000000",  # r6 = r1
        "7962100000000000",  # r2 = *(u64 *)(r6 + 16)
        "16020800ffffffff",  # if w2 == -1 goto +8
        "632af8ff00000000",  # *(u32 *)(r10 - 8) = r2
        "6a081c0007000000",  # *(u16 *)(r8 + 28) = 7
        "540300000000ffff",  # w3 &= 0xffff0000
        "1811000005000000",  # r1 = map 5, 16 bytes
        "0000000000000000",
        "8500000083000000",  # call 131
        "1500010000000000",  # if r0 == 0 goto +1
        "db10000000000000",  # lock *(u64 *)(r0 + 0) += r1
        "b700000000000000",  # r0 = 0
        "9500000000000000",  # exit
    ]


def blob(types: bytes, strings: bytes) -> bytes:
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    return header + types + strings


def btf() -> bytes:
    """BTF of: struct box { int head; union { long a; struct { int b, c; }; }; }, and an enum."""
    names = ["", "int", "box", "head", "a", "b", "c", "why", "NO", "WHY_TOO", "call"]
    strings = b"".join(name.encode() + b"\0" for name in names)
    at = {name: strings.index(b"\0" + name.encode() + b"\0") + 1 for name in names[1:]}

    def kind(name: str, number: int, count: int, size: int) -> bytes:
        return struct.pack("=III", at.get(name, 0), number << 24 | count, size)

    def member(name: str, type_id: int, bits: int) -> bytes:
        return struct.pack("=III", at.get(name, 0), type_id, bits)

    types = (
        kind("int", 1, 0, 4) + struct.pack("=I", 32)  # 1
        + kind("", 4, 2, 8) + member("b", 1, 0) + member("c", 1, 32)  # 2
        + kind("", 5, 2, 8) + member("a", 1, 0) + member("", 2, 0)  # 3
        + kind("box", 4, 2, 16) + member("head", 1, 0) + member("", 3, 64)  # 4
        + kind("why", 6, 2, 4) + struct.pack("=IiIi", at["NO"], 0, at["WHY_TOO"], 7)  # 5
        + kind("", 13, 3, 0) + struct.pack("=IIIIII", 0, 1, 0, 1, 0, 1)  # 6
        + kind("", 2, 0, 6)  # 7: a pointer to it
        + kind("call", 8, 0, 7)  # 8
    )  # fmt: skip
    return blob(types, strings)


def test_members_are_found_in_unnamed_ones_too() -> None:
    found = Btf(btf(), ["box", "why", "call"])
    assert found.offset("box", "head") == 0
    assert found.offset("box", "a") == 8
    assert found.offset("box", "c") == 12
    assert found.enum("why") == {0: "NO", 7: "WHY_TOO"}
    assert found.enum("why_not") == {}
    assert found.arguments("call") == 3


def test_what_a_kernel_lacks_is_named() -> None:
    found = Btf(btf(), ["box"])
    with pytest.raises(Unsupported, match=r"this kernel has no box\.d"):
        found.offset("box", "d")
    with pytest.raises(Unsupported, match=r"this kernel has no crate\.head"):
        found.offset("crate", "head")
    with pytest.raises(Unsupported, match="this kernel has no call"):
        found.arguments("call")


@pytest.mark.parametrize(
    "data",
    [b"", b"\xeb\x9f" + bytes(30), btf()[:60], bytes(2000), blob(bytes([0] * 7 + [31] * 5), b"")],
)
def test_no_btf_is_no_crash(data: bytes) -> None:
    with pytest.raises(Unsupported, match="/sys/kernel/btf/vmlinux"):
        Btf(data, ["box"]).offset("box", "head")


def test_a_kernel_without_btf_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="was built without CONFIG_DEBUG_INFO_BTF"):
        Btf.of_kernel(["box"], tmp_path / "vmlinux")


def test_functions_by_address(tmp_path: Path) -> None:
    symbols = tmp_path / "kallsyms"
    symbols.write_text(
        "ffffffff81000000 T _text\nffffffff81000100 t nf_hook_slow\n"
        "ffffffff81000180 d some_data\nffffffff81000200 T ip_rcv\n"
        "ffffffffc0000010 t veth_xmit\t[veth]\n"
    )
    assert functions_of([0xFFFFFFFF810001F0, 0xFFFFFFFFC0000020, 0x1000], symbols) == {
        0xFFFFFFFF810001F0: "nf_hook_slow",
        0xFFFFFFFFC0000020: "veth_xmit",
    }
    symbols.write_text("0000000000000000 T _text\n0000000000000000 t nf_hook_slow\n")
    assert functions_of([0xFFFFFFFF810001F0], symbols) == {}
    assert functions_of([1], tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("code", "lockdown", "words"),
    [
        (1, "none integrity [confidentiality]", "locked down"),
        (1, "[none] integrity confidentiality", "needs CAP_BPF and CAP_PERFMON"),
        (1, None, "no seccomp filter against bpf"),
        (22, None, "needs linux 5.8"),
        (38, None, "without CONFIG_BPF_SYSCALL"),
    ],
)
def test_a_refusal_says_why(
    code: int, lockdown: str | None, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> int:
        raise PlatformError("no", code)

    path = tmp_path / "lockdown"
    if lockdown is not None:
        path.write_text(lockdown)
    monkeypatch.setattr(bpf_program, "_LOCKDOWN", path)
    monkeypatch.setattr(bpf_program, "bpf", refuse)
    with pytest.raises(Unsupported, match=words) as caught:
        bpf_program.Ring(4096)
    assert caught.value.errno == code
