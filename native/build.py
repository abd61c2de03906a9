"""Builds tundp._native: cffi, out-of-line API mode, limited API (one .so for 3.11 and later).

The declarations are the marked region of include/tundp.h, so there is no second copy of
them to drift. Run by setup.py; sources are relative to the project's root.
"""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
SOURCES = [
    f"native/src/{name}.c"
    for name in (
        "checksum",
        "batch",
        "batch_decap",
        "batch_encap",
        "coalesce",
        "encap",
        "fib",
        "fragment",
        "icmp",
        "segment",
        "simple",
        "worker",
    )
]


def declarations() -> str:
    """What lies between the markers of the public header."""
    text = (HERE / "include" / "tundp.h").read_text(encoding="utf-8")
    return text.split("/* cdef-begin */")[1].split("/* cdef-end */")[0]


ffi = FFI()
ffi.cdef(declarations())
ffi.set_source(
    "tundp._native",
    '#include "tundp.h"',
    sources=SOURCES,
    include_dirs=["native/include", "native/src"],
    extra_compile_args=["-std=c11", "-D_GNU_SOURCE", "-O3", "-fvisibility=hidden"],
    py_limited_api=True,
)
