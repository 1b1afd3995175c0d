"""What every test starts from: one thread, fixed draws, and tests that say by name why they did not run."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it; processes started by tests inherit it

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=25, database=None)
hypothesis.settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate-golden", action="store_true", help="write tests/golden/*.json anew, then look at git diff"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRIVIUM_DATA"):
        return
    for item in items:
        if item.get_closest_marker("data"):
            item.add_marker(pytest.mark.skip(reason=f"{item.name}: set TRIVIUM_DATA to the folder of research data"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Skipped tests by name, without any flag."""
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        terminalreporter.write_line(f"SKIPPED {report.nodeid}: {reason}")


@pytest.fixture(autouse=True)
def _fixed_draws() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
