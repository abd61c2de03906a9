"""What a kernel is said to have, and which engine that means."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from tundp.choices import Engine
from tundp.engine import choose
from tundp.engine.native import library
from tundp.errors import Unsupported
from tundp.linux.offload import ALL, KernelOffloads, Offload, find_offloads, udp_segment_defect


@pytest.mark.parametrize("each", Offload)
def test_every_offload_has_a_meaning(each: Offload) -> None:
    meaning = each.meaning
    assert meaning.means
    assert meaning.since[0].isdigit()
    assert meaning.without


@pytest.mark.parametrize(
    ("release", "is_defective"),
    [
        ("6.18.44", False),
        ("6.17.0-1007-aws", False),
        ("7.0", True),
        ("7.0.0-rc1", True),
        ("7.0.12", True),
        ("7.1.4", True),
        ("7.1.4-arch1-1", True),
        ("7.1.5", False),
        ("7.2", False),
        ("4.18.0-553.el8", False),
        ("garbage", False),
    ],
)
def test_releases_that_mangle_equal_datagrams(release: str, is_defective: bool) -> None:
    assert (udp_segment_defect(release) is not None) is is_defective


def test_a_defective_kernel_costs_udp_segment_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found_on(release: str) -> KernelOffloads:
        monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
        return find_offloads()

    sound, defective = found_on("7.1.5"), found_on("7.1.0")
    assert "mangles" in defective.missing[Offload.UDP_SEGMENT]
    assert defective.max_segments == 1
    # Whatever this kernel has besides, it has on either release.
    assert defective.offloads == sound.offloads - {Offload.UDP_SEGMENT}


@pytest.mark.parametrize("each", Offload)
def test_what_is_disabled_is_missing_for_that_reason(each: Offload) -> None:
    found = find_offloads(frozenset({each}))
    assert each not in found.offloads
    assert found.missing[each] == "switched off by --disable-offloads"
    assert found.offloads | found.missing.keys() == ALL


def kernel(*offloads: Offload) -> KernelOffloads:
    return KernelOffloads(offloads=frozenset(offloads), max_segments=64, missing={})


def test_auto_takes_super_packets_else_batches_else_python(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose.best_engine(kernel(*ALL))[0] is Engine.GSO
    assert choose.best_engine(kernel(Offload.UDP_GRO))[0] is Engine.GSO
    assert choose.best_engine(kernel())[0] is Engine.MMSG
    with monkeypatch.context() as patched:
        patched.setattr(choose, "why_no_batches", lambda: "recvmmsg: Operation not permitted")
        assert choose.best_engine(kernel(*ALL)) == (
            Engine.SIMPLE,
            "slow: recvmmsg: Operation not permitted",
        )

    def missing() -> None:
        raise Unsupported("the native module is not built")

    monkeypatch.setattr(library, "require", missing)
    name, why = choose.best_engine(kernel(*ALL))
    assert name is Engine.REFERENCE
    assert "not built" in why
