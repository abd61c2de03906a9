"""Per-device IPv4 and IPv6 settings under /proc/sys/net."""

from __future__ import annotations

from pathlib import Path

from tundp.errors import PlatformError


def set_device(family: str, device: str, name: str, value: int) -> None:
    """Set net.<family>.conf.<device>.<name> in the current network namespace.

    PlatformError names the sysctl, e.g. where /proc/sys is read-only (containers).
    """
    path = Path("/proc/sys/net", family, "conf", device, name)
    try:
        path.write_text(f"{value}\n", encoding="ascii")
    except OSError as error:
        raise PlatformError(
            f"cannot set {path} to {value}: {error.strerror}", error.errno
        ) from None
