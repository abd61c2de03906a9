"""What this process may do: capabilities(7), read from /proc."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Final

from tundp.errors import PlatformError

CAP_NET_ADMIN: Final = 12
"""linux/capability.h: devices, addresses, routes, forced socket buffers."""
_NAMES: Final = {CAP_NET_ADMIN: "CAP_NET_ADMIN"}


def require(capability: int, purpose: str) -> None:
    """PlatformError naming the capability and the fix if this process lacks it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    if not int(effective.split()[1], 16) >> capability & 1:
        raise PlatformError(
            f"{purpose} need {_NAMES[capability]}, which this process lacks:"
            " run as root, or let systemd grant it (systemd/tundp.service)",
            errno.EPERM,
        )
