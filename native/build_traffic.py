"""Builds tundp._traffic, the generators of bench and labs. As build.py, from their own header."""

from pathlib import Path

from cffi import FFI

text = (Path(__file__).parent / "bench" / "traffic.h").read_text(encoding="utf-8")

ffi = FFI()
ffi.cdef(text.split("/* cdef-begin */")[1].split("/* cdef-end */")[0])
ffi.set_source(
    "tundp._traffic",
    '#include "traffic.h"',
    sources=["native/bench/traffic.c", "native/bench/numbered.c", "native/bench/bare.c"],
    include_dirs=["native/bench"],
    extra_compile_args=["-std=c11", "-D_GNU_SOURCE", "-O3", "-fvisibility=hidden"],
    py_limited_api=True,
)
