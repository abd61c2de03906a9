"""The C extension module tundp._native, or why it is missing. Imported by this folder only."""

from __future__ import annotations

from typing import Any, Final

from tundp.errors import Unsupported

ABI: Final = 12

try:
    from tundp import _native
except ImportError as import_error:
    _native = None  # type: ignore[assignment]
    _missing = str(import_error)


def require() -> Any:
    """The extension module, or Unsupported with the way to build it."""
    if _native is None:
        raise Unsupported(f"the native module is not built ({_missing}): run make build")
    if _native.lib.TUNDP_ABI != ABI:
        raise Unsupported(
            f"the native module has ABI {_native.lib.TUNDP_ABI}, this Python code {ABI}:"
            " run make build"
        )
    return _native
