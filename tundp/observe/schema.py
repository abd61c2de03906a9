"""JSON Schemas of what `--json` prints, for the files beside this one.

`python -m tundp.cli.docs` writes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from tundp.observe.codec import json_schema
from tundp.observe.drops import DROPS_SCHEMA, DropsReport
from tundp.observe.status import STATUS_SCHEMA, Status

PATH: Final = Path(__file__).with_name("status.schema.json")
DROPS_PATH: Final = Path(__file__).with_name("drops.schema.json")


def text() -> str:
    """What the status's file must hold."""
    title = f"tundp status, schema {STATUS_SCHEMA}"
    return json.dumps(json_schema(Status, title=title), indent=2) + "\n"


def drops_text() -> str:
    """What the file of `tundp drops` must hold."""
    title = f"tundp drops, schema {DROPS_SCHEMA}"
    return json.dumps(json_schema(DropsReport, title=title), indent=2) + "\n"
