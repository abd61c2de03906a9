"""The JSON Schema of the status, for the file `PATH` beside this one.

`python -m tundp.cli.docs` writes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from tundp.observe.codec import json_schema
from tundp.observe.status import STATUS_SCHEMA, Status

PATH: Final = Path(__file__).with_name("status.schema.json")


def text() -> str:
    """What the file must hold."""
    title = f"tundp status, schema {STATUS_SCHEMA}"
    return json.dumps(json_schema(Status, title=title), indent=2) + "\n"
