"""`trivium data doctor`: what is wrong with data, before a model is trained on it."""

from __future__ import annotations

import json
import os
import shlex
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.cli.overrides import set_overrides
from trivium.errors import TriviumError

if TYPE_CHECKING:
    from trivium.data.doctor import Diagnosis
    from trivium.train.protocol import Stream

EXAMPLES = 3  # of each problem on the terminal; the others stand in the report


def doctor(
    *,
    recipe: str = "flava",
    size: str | None = None,
    out: Path = Path("data-doctor"),
    sample: int | None = None,
    queue: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> None:
    """Examine the data of a run and write report.html and report.json: unreadable samples, duplicates, leakage between
    splits, captions that are cut or like labels, the loss that duplicates impose, the speed of the loader.

    Takes --data.pairs, --data.images, --data.text, --data.validation and every other field as pretrain does; without
    any, the embedded data.

      trivium data doctor --data.pairs products.csv --data.validation held-out.csv

    Args:
        recipe: "flava" (pairs, images, text), "clip" or "albef" (pairs), "dino" or "dvae" (images), or a function of
            your own: my_run.py:shop.
        size: the recipe's one dial, such as tiny, small or base.
        out: the folder to write into.
        sample: of each stream, how many samples to look at; by default as many as a minute allows for all of them.
        queue: length of a momentum queue that is meant to be used; by default the recipe's, or that of ALBEF.
        overrides: leaves by their dotted path, such as {"data.pairs": ["a.csv"]}.
    """
    if sample is not None and sample < 2:
        raise TriviumError(f"--sample {sample}: to compare samples it takes at least 2")
    if out.exists() and not out.is_dir():
        raise TriviumError(f"{out} is a file: name a folder with --out")
    from trivium.data.decode import decode
    from trivium.data.doctor import ALBEF_QUEUE, diagnose
    from trivium.evaluate import data_report
    from trivium.manifest import write_whole
    from trivium.recipes import RECIPES
    from trivium.recipes.data import HasInputs
    from trivium.recipes.notices import noticed
    from trivium.train import config

    tree = None  # "finetune" would have to be told a task
    if recipe != "finetune":
        tree = config.build(config.Config(recipe, {} if size is None else {"size": size}, {}), RECIPES)
        tree = set_overrides(tree, overrides or {})
    if not isinstance(tree, HasInputs):
        raise TriviumError(
            f"the recipe {recipe} reads tables of tasks, and the doctor examines captioned pictures, pictures and"
            " texts: what is wrong with such tables their readers tell at the start of a run"
        )
    inputs = tree.inputs()
    held_out: dict[str, Stream] = {}
    for stream in inputs.held_out:
        if all(stream.source is not other.source for other in held_out.values()):
            name = "validation" if stream.name == "pairs" else f"validation {stream.name}"
            held_out[name] = replace(stream, name=name)
    if queue is None:
        queue = ALBEF_QUEUE if inputs.queue is None else inputs.queue
    found = diagnose(
        inputs.train,
        list(held_out.values()),
        decode,
        inputs.tokenizer,
        seed=tree.train.seed,
        workers=tree.train.workers,
        threads=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        queue=queue,
        bad_rate=tree.train.bad_rate,
        sample=sample,
        progress=lambda part: print(part, file=sys.stderr),
    )
    found.notes += noticed(inputs.sources)
    command = shlex.join(["trivium", *sys.argv[1:]])
    page = out / "report.html"
    data_report.write(page, found, {each.name: each for each in inputs.train} | held_out, decode, command)
    content = {"schema": 1, "command": command, **found.as_json()}
    write_whole(out / "report.json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    _summarise(found, tree.train.workers)
    print(f"report: {page}")


def _summarise(found: Diagnosis, workers: int) -> None:
    from rich.console import Console

    console = Console(highlight=False)

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, soft_wrap=True)

    for name, facts in found.streams.items():
        parts = [f"{facts.rows:,} samples" + (f", {facts.read:,} looked at" if facts.read < facts.rows else "")]
        if facts.pictures is not None:
            parts.append(f"{facts.pictures:,} distinct pictures, {facts.median_width} x {facts.median_height} pixels")
        if facts.captions is not None:
            parts.append(f"{facts.captions:,} texts, {facts.tokens['50 %']} tokens long")
        say(f"{name}: {'; '.join(parts)}")
    if found.samples_per_second is not None:
        each = ", ".join(f"{n} {f.samples_per_second:,.0f}" for n, f in found.streams.items() if f.samples_per_second)
        by = f"{workers} worker{'' if workers == 1 else 's'}" if workers else "no worker"
        rate = f"{found.samples_per_second:,.0f}"
        say(f"the loader gives about {rate} samples/s here with {by} ({each}): a step that is faster waits for it")
    for note in found.notes:
        say(f"note: {note}")
    for finding in found.findings:
        mark, style = ("!", "bold") if finding.is_problem else ("·", "")
        say(f"{mark} {finding.stream}: {finding.sentence}", style)
        if finding.is_problem:
            for example in finding.examples[:EXAMPLES]:
                say(f"    {textwrap.shorten(example, 160, placeholder=' ...')}")
        say(f"  → {finding.advice}")
    if not any(finding.is_problem for finding in found.findings):
        say("nothing to mend was found")
