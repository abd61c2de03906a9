"""The JSON Schemas of what the admin socket answers, for files beside this one.

`python -m tundp.cli.docs` writes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from tundp.observe.codec import json_schema
from tundp.observe.leases import LEASES_SCHEMA, Leases
from tundp.observe.status import STATUS_SCHEMA, Status

PATH: Final = Path(__file__).with_name("status.schema.json")
LEASES_PATH: Final = Path(__file__).with_name("leases.schema.json")


def text() -> str:
    """What the file of the status must hold."""
    title = f"tundp status, schema {STATUS_SCHEMA}"
    return json.dumps(json_schema(Status, title=title), indent=2) + "\n"


def leases_text() -> str:
    """What the file of the leases must hold."""
    title = f"tundp leases, schema {LEASES_SCHEMA}"
    return json.dumps(json_schema(Leases, title=title), indent=2) + "\n"
