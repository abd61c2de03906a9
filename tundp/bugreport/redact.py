"""The one door through which everything goes into a report: texts, documents and packets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from tundp.bugreport.packets import headers_of, renamed
from tundp.bugreport.pseudonyms import Pseudonyms
from tundp.bugreport.secrets import BLANKED, LEAST_LEN, Secrets, is_secret_name
from tundp.printable import printable

LINE_MAX: Final = 1 << 16
"""Characters of a line of foreign text; the rest of it is left out."""


@dataclass(slots=True)
class Redactor:
    """Removes secrets, always, and replaces addresses and host names where that was asked for."""

    secrets: Secrets = field(default_factory=Secrets)
    pseudonyms: Pseudonyms | None = None

    def words(self, text: str) -> str:
        """A text without secrets, and with pseudonyms if there are any."""
        # Most words of a document hold no secret, but may be a host's name.
        if not text.isalpha() or len(text) >= LEAST_LEN:
            text = self.secrets.hide(text)
        return text if self.pseudonyms is None else self.pseudonyms.text(text)

    def text(self, text: str) -> str:
        """Foreign text as it may be shown on a terminal: no controls but line ends and tabs."""
        lines = self.words(text).split("\n")
        return "\n".join(
            "\t".join(printable(part, LINE_MAX) for part in line.rstrip("\r").split("\t"))
            for line in lines
        )

    def value(self, value: Any) -> Any:
        """A JSON value, its texts and the names of its members likewise."""
        if isinstance(value, str):
            return self.words(value)
        if isinstance(value, dict):
            return {
                self.words(name): BLANKED
                if is_secret_name(name) and isinstance(each, str) and each
                else self.value(each)
                for name, each in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.value(each) for each in value]
        return value

    def packet(self, packet: bytes | bytearray) -> bytes:
        """The headers of a packet."""
        headers = headers_of(packet)
        return headers if self.pseudonyms is None else renamed(headers, self.pseudonyms)
