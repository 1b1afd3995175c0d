"""Which checkpoint of a run is the best by one figure of its evaluations, and when to stop waiting for a better one.

It is read from the lines of metrics.jsonl, so a run that is resumed chooses as one that was never stopped.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class Selection:
    """Takes note of every evaluation. Of equal figures the first is the best."""

    def __init__(self, figure: str, patience: int | None = None) -> None:
        """figure: dotted path in the results ("figures.dev.accuracy"), the higher the better. patience: evaluations in
        a row without a better figure after which the run ends; None: it never does."""
        self.figure = figure
        self.patience = patience
        self.start: float | None = None  # before the first step, where that was measured
        self.best_step: int | None = None
        self.best = -math.inf
        self.since = 0  # evaluations that were no better

    @classmethod
    def of_log(cls, metrics: Path, figure: str, patience: int | None = None) -> Selection:
        """What the lines of a run's log came to."""
        selection = cls(figure, patience)
        lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.exists() else []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:  # a kill cut the line short, or the disk damaged it
                continue
            if isinstance(entry, dict) and "results" in entry:
                selection.note(entry["step"], entry["results"])
        return selection

    def note(self, step: int, results: dict[str, Any]) -> bool:
        """Whether these are the best results so far. A figure that is no number is never the best, and what was there
        before the first step is none of this run's."""
        value = value_of(results, self.figure)
        if step == 0:
            self.start = value
            return False
        better = value is not None and value > self.best
        if better:
            assert value is not None
            self.best, self.best_step, self.since = value, step, 0
        else:
            self.since += 1
        return better

    def __str__(self) -> str:
        sentence = f"{self.figure} was highest at step {self.best_step} ({self.best:.4g})"
        if self.start is None:
            return sentence
        if self.best > self.start:
            return f"{sentence}, from {self.start:.4g} before training"
        sentence += f", no higher than before training ({self.start:.4g})"
        return f"{sentence}: the model that it began with is at least as good"

    @property
    def is_exhausted(self) -> bool:
        return self.patience is not None and self.since >= self.patience


def value_of(results: dict[str, Any], figure: str) -> float | None:
    """The number under the longest matching names of a nested dict: names may hold dots themselves."""
    for name, value in results.items():
        if name == figure:
            return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
        if isinstance(value, dict) and figure.startswith(f"{name}."):
            return value_of(value, figure.removeprefix(f"{name}."))
    return None
