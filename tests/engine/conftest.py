"""A lab for each test; nothing of it outlives the test. Needs root."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import pytest

from tundp.lab.lab import Lab

_numbers = itertools.count(1)


@pytest.fixture
def make_lab() -> Callable[[], Lab]:
    """A lab with a name nobody else on the machine has."""
    return lambda: Lab(f"te{os.getpid()}x{next(_numbers)}")
