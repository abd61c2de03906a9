"""The names operators write and read: they may grow, never change or move."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tundp import choices
from tundp.choices import Engine, Layout, Offload, SourceCheck

NAMES = {
    choices.Engine: ["auto", "gso", "mmsg", "simple", "reference"],
    choices.Layout: ["shared", "split"],
    choices.SourceCheck: ["off", "count", "enforce"],
    choices.Offload: [
        "tun-tso",
        "tun-uso",
        "udp-segment",
        "udp-gro",
        "tcp-coalesce",
        "udp-coalesce",
    ],
}


@pytest.mark.parametrize("choice", NAMES, ids=lambda choice: choice.__name__)
def test_names(choice: type[Engine] | type[Layout] | type[Offload] | type[SourceCheck]) -> None:
    assert [each.value for each in choice] == NAMES[choice]


@pytest.mark.parametrize("offload", choices.Offload)
def test_each_offload_has_a_meaning(offload: Offload) -> None:
    meaning = offload.meaning
    assert all((meaning.means, meaning.since, meaning.without))


def test_needs_nothing_but_the_standard_library() -> None:
    code = "import sys, tundp.choices; print(*sorted({n.split('.')[0] for n in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert not set(loaded.split()) & {"numpy", "cffi", "_cffi_backend", "asyncio"}
