"""The request that begins chaos, as a document of the admin socket."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tundp.errors import Unsupported
from tundp.wire.impair import LONGEST_S, SEED_MAX, Impairment, read_impairment

AGREED: Final = "yes_break_traffic"
"""The member without which nothing is impaired."""
NOT_AGREED: Final = (
    "this breaks the traffic of pods on purpose, for as long as it lasts: say"
    " --yes-break-traffic if that is wanted"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to impair, and for how long."""

    peer: str
    """Subnet, PublicIP or inner address of a peer, or `all`."""
    impairment: Impairment
    for_s: float
    seed: int | None = None
    """None: any."""

    def to_json(self) -> dict[str, Any]:
        """The request, agreed to."""
        return {
            AGREED: True,
            "peer": self.peer,
            "for_s": self.for_s,
            "seed": self.seed,
            "impairment": self.impairment.to_json(),
        }


def read_order(document: Any) -> Order:
    """What a request asks for. Unsupported names what is wrong with it."""
    if not isinstance(document, Mapping):
        raise Unsupported("the request is no JSON object")
    if document.get(AGREED) is not True:
        raise Unsupported(NOT_AGREED)
    peer, for_s, seed = (document.get(name) for name in ("peer", "for_s", "seed"))
    if not isinstance(peer, str):
        raise Unsupported("peer is missing: its subnet or PublicIP, or all")
    if isinstance(for_s, bool) or not isinstance(for_s, (int, float)) or not 0 < for_s <= LONGEST_S:
        raise Unsupported(f"for_s is out of range: above 0 and at most {LONGEST_S:.0f}")
    if seed is not None and (
        isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= SEED_MAX
    ):
        raise Unsupported(f"seed is out of range: 0 to {SEED_MAX}")
    members = document.get("impairment")
    if not isinstance(members, Mapping):
        raise Unsupported('impairment is missing: an object, such as {"loss": 0.01}')
    try:
        impairment = read_impairment(members)
    except ValueError as error:
        raise Unsupported(str(error)) from None
    return Order(peer=peer, impairment=impairment, for_s=float(for_s), seed=seed)
