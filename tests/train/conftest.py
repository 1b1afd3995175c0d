"""A run that nothing stopped, which others are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import make, with_train

from trivium.train.trainer import train


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    outcome = train(make(with_train(log_every=1)), folder)
    assert (outcome.done, outcome.signal, outcome.exit_code) == (20, None, 0)
    return folder
