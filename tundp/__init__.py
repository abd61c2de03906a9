"""tundp: flannel's UDP backend done right."""

from typing import Final

__version__: Final = "0.2.0"
__all__ = ["__version__"]
