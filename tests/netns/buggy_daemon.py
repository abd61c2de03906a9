"""Runs a daemon with bugs planted in it. argv: JSON of the plants, then the daemon's flags.

A plant is [target, trigger, times, when]: from the moment the file `trigger` is there, so many
calls of `target` (`module:Class.method`) raise, `before` or `after` the method did its work.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from tundp.daemon import process
from tundp.settings.sources import load_settings


def plant(target: str, trigger: str, times: int, when: str) -> None:
    module_name, _, path = target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *classes, name = path.split(".")
    for each in classes:
        owner = getattr(owner, each)
    original = getattr(owner, name)
    left = [times]

    @functools.wraps(original)
    def planted(*arguments: Any, **keywords: Any) -> Any:
        is_due = left[0] > 0 and Path(trigger).exists()
        left[0] -= is_due
        if is_due and when == "before":
            raise RuntimeError(f"planted in {path}")
        result = original(*arguments, **keywords)
        if is_due:
            raise RuntimeError(f"planted in {path}")
        return result

    setattr(owner, name, planted)


settings = load_settings(sys.argv[2:], os.environ)
store = process.open_store(settings)
for each in json.loads(sys.argv[1]):
    plant(*each)
process.serve(settings, store)
