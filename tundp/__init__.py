"""tundp: flannel's UDP backend done right."""

from typing import Final

__version__: Final = "0.1.0"
__all__ = ["__version__"]
