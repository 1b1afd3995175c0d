"""What must be alike: on all processes of a run, and before and after it was stopped. One that differs is told, since
the run would go on all the same and learn something else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trivium.errors import TriviumError
from trivium.train import distributed
from trivium.train.config import Config
from trivium.train.protocol import Blocks, Stream

# Options that each process may have for itself.
OF_A_PROCESS = ("train.device", "train.workers", "train.threads", "train.compile", "train.tensorboard")

Facts = dict[str, dict[str, Any]]  # by name of the stream


def facts_of(streams: Iterable[Stream]) -> Facts:
    """What the order of a stream's samples is a function of, besides the seed: how many rows, in which blocks."""
    found: Facts = {}
    for stream in streams:
        sizes = Blocks.of(stream.source.blocks()).sizes
        digest = hashlib.sha256(sizes.astype("<i8").tobytes()).hexdigest()
        found[stream.name] = {"rows": len(stream.source), "blocks": digest}
    return found


def refuse_other_processes(settings: Config, data: Facts) -> None:
    """Raises TriviumError on all processes where one of them has other values of the recipe, or other data."""
    values = {name: value for name, value in settings.values.items() if name not in OF_A_PROCESS}
    distributed.refuse_differences(values, "start all of them with the same command")
    for fact, called in (("rows", "the number of rows"), ("blocks", "the digest of the blocks")):
        counted = {f"{called} of stream {name}": facts[fact] for name, facts in data.items()}
        distributed.refuse_differences(counted, "give all of them the same files")


def refuse_other_data(now: Facts, before: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """Raises TriviumError where samples would come in another order than `before`, when the run in `out` was saved.
    Checkpoints of older versions say nothing of a stream."""
    for name, facts in now.items():
        saved = before.get(name, facts)
        if facts == saved:
            continue
        changed = f"{facts['rows']} rows, and had {saved['rows']}"
        if facts["rows"] == saved["rows"]:
            changed = f"its {facts['rows']} rows in other files or blocks than"
        raise TriviumError(
            f"stream {name} has {changed} when {out} was saved, so its samples would come in another order: put its"
            " data back as they were, or begin a new run with --init from the checkpoint"
        )
