"""What pyproject.toml cannot say: the cffi module, and one wheel for every CPython >= 3.11."""

from setuptools import setup

setup(
    cffi_modules=["native/build.py:ffi", "native/build_traffic.py:ffi"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
