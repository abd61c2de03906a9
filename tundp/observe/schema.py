"""The JSON Schemas of what commands print with --json, for the files beside this one.

`python -m tundp.cli.docs` writes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from tundp.observe.codec import json_schema
from tundp.observe.drops import DROPS_SCHEMA, DropsReport
from tundp.observe.explain.model import EXPLAIN_SCHEMA, Explanation
from tundp.observe.leases import LEASES_SCHEMA, Leases
from tundp.observe.ledger import LEDGER_SCHEMA, Ledger
from tundp.observe.matrix import MATRIX_SCHEMA, Matrix
from tundp.observe.ping import PING_SCHEMA, Ping
from tundp.observe.replay import REPLAY_SCHEMA, Replayed
from tundp.observe.status import STATUS_SCHEMA, Status
from tundp.observe.top import TOP_SCHEMA, TopRound

PATH: Final = Path(__file__).with_name("status.schema.json")
DROPS_PATH: Final = Path(__file__).with_name("drops.schema.json")
LEASES_PATH: Final = Path(__file__).with_name("leases.schema.json")


def text() -> str:
    """What the status's file must hold."""
    title = f"tundp status, schema {STATUS_SCHEMA}"
    return json.dumps(json_schema(Status, title=title), indent=2) + "\n"


def drops_text() -> str:
    """What the file of `tundp drops` must hold."""
    title = f"tundp drops, schema {DROPS_SCHEMA}"
    return json.dumps(json_schema(DropsReport, title=title), indent=2) + "\n"


_OTHERS: Final[dict[str, tuple[type[Any], str]]] = {
    "explain": (Explanation, f"tundp explain, schema {EXPLAIN_SCHEMA}"),
    "ledger": (Ledger, f"GET /v1/ledger, schema {LEDGER_SCHEMA}"),
    "matrix": (Matrix, f"tundp matrix, schema {MATRIX_SCHEMA}"),
    "ping": (Ping, f"tundp ping, schema {PING_SCHEMA}"),
    "replay": (Replayed, f"tundp replay, schema {REPLAY_SCHEMA}"),
    "top": (TopRound, f"tundp top, schema {TOP_SCHEMA}"),
}


def others() -> dict[str, str]:
    """What the other files must hold, by their names beside this one."""
    return {
        f"{name}.schema.json": json.dumps(json_schema(kind, title=title), indent=2) + "\n"
        for name, (kind, title) in _OTHERS.items()
    }


def leases_text() -> str:
    """What the file of the leases must hold."""
    title = f"tundp leases, schema {LEASES_SCHEMA}"
    return json.dumps(json_schema(Leases, title=title), indent=2) + "\n"
