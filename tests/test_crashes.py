"""A run that is killed again and again is the run that never died; 200 times: make campaign."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import TinyData
from tests.crashes import campaign


@pytest.mark.long
def test_a_run_that_was_killed_is_the_run_that_never_died(tmp_path: Path, tiny_data: TinyData) -> None:
    told = campaign(tmp_path, tiny_data, kills=4, updates=400, seed=2)
    assert told["worst"] < 1e-6
