"""Builds tundp._native: cffi, out-of-line API mode, limited API (one .so for 3.11 and later).

The declarations are the marked regions of the headers in include/, so there is no second copy
of them to drift; tables.py writes the one that comes from Python. Run by setup.py; sources
are relative to the project's root.
"""

import sys
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import tables  # noqa: E402

FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O3", "-fvisibility=hidden")
WARNINGS = ("-Wall", "-Wextra", "-Wshadow", "-Wstrict-prototypes", "-Wvla")
"""Of the shipped build. The tests add -Werror, and -Wconversion, which cffi's code fails."""
HEADERS = ("tundp_tables.h", "tundp.h", "tundp_twins.h")
SOURCES = [
    f"native/src/{name}.c"
    for name in (
        "batch",
        "batch_decap",
        "batch_encap",
        "checksum",
        "coalesce",
        "count",
        "device_mtu",
        "facts",
        "fib",
        "filter",
        "fragment",
        "hop_slots",
        "hop_sockets",
        "icmp",
        "publish",
        "segment",
        "simple",
        "single",
        "tap",
        "train",
        "twins",
        "verdict",
    )
]


def declarations() -> str:
    """What lies between the markers of the public headers."""
    texts = [(HERE / "include" / name).read_text(encoding="utf-8") for name in HEADERS]
    return "".join(text.split("/* cdef-begin */")[1].split("/* cdef-end */")[0] for text in texts)


tables.write()
ffi = FFI()
ffi.cdef(declarations())
ffi.set_source(
    "tundp._native",
    '#include "tundp_twins.h"',
    sources=SOURCES,
    include_dirs=["native/include", "native/src"],
    extra_compile_args=[*FLAGS, *WARNINGS],
    py_limited_api=True,
)
