"""`tundp capture --install-wireshark`: files that let Wireshark list tundp, and colour packets."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Final

from tundp.errors import PlatformError
from tundp.files import write_atomically

_FILES: Final = {
    "tundp.lua": ("plugins/tundp.lua", 0o644),
    "colorfilters": ("profiles/tundp/colorfilters", 0o644),
}
"""Name in the package to path below the folder, and mode."""
_ENTRY: Final = "extcap/tundp"


def install(folder: Path) -> Iterator[str]:
    """Write the extcap entry, the Lua post-dissector and the colour rules; what to do with them.

    PlatformError if a file cannot be written.
    """
    folder = folder.expanduser().absolute()
    texts = {path: (_text(name), mode) for name, (path, mode) in _FILES.items()}
    texts[_ENTRY] = (_entry(), 0o755)
    for path, (text, mode) in sorted(texts.items()):
        target = folder / path
        try:
            write_atomically(target, text, mode=mode)
        except OSError as error:
            raise PlatformError(
                f"cannot write {target}: {error.strerror}; name another folder", error.errno
            ) from None
        yield f"wrote {target}"
    entry, plugin = (
        shlex.quote(str(folder / _ENTRY)),
        shlex.quote(str(folder / "plugins/tundp.lua")),
    )
    yield f"the interface: ln -s {entry} EXTCAP, the `Extcap path` of tshark -G folders"
    yield f"decisions as fields: ln -s {plugin} ~/.local/lib/wireshark/plugins/"
    yield f"colours: copy {shlex.quote(str(folder / 'profiles/tundp'))} to"
    yield "  ~/.config/wireshark/profiles/, then: wireshark -C tundp"


def _entry() -> str:
    """A script that starts this very installation of tundp, as Wireshark passes no arguments."""
    program = Path(sys.argv[0]).absolute()
    if program.name == "tundp" and os.access(program, os.X_OK):
        words = [str(program)]
    else:
        words = [sys.executable, "-m", "tundp"]
    return (
        "#!/bin/sh\n"
        "# Lists and captures tundp's daemons for Wireshark and tshark; made by"
        " `tundp capture --install-wireshark`.\n"
        f'exec {shlex.join(words)} capture "$@"\n'
    )


def _text(name: str) -> str:
    return (resources.files("tundp.cli") / "wireshark_files" / name).read_text(encoding="utf-8")
