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
    from trivium.data.tokenizer import Tokenizer
    from trivium.data.views import Views
    from trivium.recipes.data import Sources
    from trivium.recipes.flava import FlavaRecipe
    from trivium.train.protocol import Stream

NAMES = ("pairs", "images", "text")
EXAMPLES = 3  # of each problem on the terminal; the others stand in the report


def doctor(
    *,
    recipe: str = "flava",
    size: str | None = None,
    out: Path = Path("data-doctor"),
    sample: int | None = None,
    queue: int = 65_536,
    overrides: Mapping[str, Any] | None = None,
) -> None:
    """Examine the data of a run and write report.html and report.json: unreadable samples, duplicates, leakage between
    splits, captions that are cut or like labels, the loss that duplicates impose, the speed of the loader.

    Takes --data.pairs, --data.images, --data.text, --data.validation and every other field as pretrain does; without
    any, the embedded data.

      trivium data doctor --data.pairs products.csv --data.validation held-out.csv

    Args:
        recipe: "flava", or a function of your own: my_run.py:shop.
        size: the recipe's one dial, such as tiny, small or base.
        out: the folder to write into.
        sample: of each stream, how many samples to look at; by default as many as a minute allows for all of them.
        queue: length of a momentum queue that is meant to be used; by default that of ALBEF.
        overrides: leaves by their dotted path, such as {"data.pairs": ["a.csv"]}.
    """
    if sample is not None and sample < 2:
        raise TriviumError(f"--sample {sample}: to compare samples it takes at least 2")
    if out.exists() and not out.is_dir():
        raise TriviumError(f"{out} is a file: name a folder with --out")
    from trivium.data.doctor import diagnose
    from trivium.evaluate import data_report
    from trivium.manifest import write_whole
    from trivium.recipes import RECIPES
    from trivium.recipes.data import make_streams, open_sources
    from trivium.recipes.flava import FlavaRecipe
    from trivium.recipes.notices import noticed
    from trivium.train import config

    tree = config.build(config.Config(recipe, {} if size is None else {"size": size}, {}), RECIPES)
    tree = set_overrides(tree, overrides or {})
    if not isinstance(tree, FlavaRecipe):
        raise TriviumError(f"the recipe {recipe} is of another family than FLAVA: the doctor does not know its data")
    sources = open_sources(tree.data)
    views, patch, tokenizer = _inputs(tree, sources)
    train = make_streams(tree.data, sources, views, patch, tokenizer, None, NAMES)
    held_out: dict[str, Stream] = {}
    for stream in make_streams(tree.data, sources, views, patch, tokenizer, None, NAMES, train=False):
        if all(stream.source is not other.source for other in held_out.values()):
            name = "validation" if stream.name == "pairs" else f"validation {stream.name}"
            held_out[name] = replace(stream, name=name)
    found = diagnose(
        train,
        list(held_out.values()),
        views.decode,
        tokenizer,
        tree.data.max_length,
        seed=tree.train.seed,
        workers=tree.train.workers,
        threads=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        queue=queue,
        bad_rate=tree.train.bad_rate,
        sample=sample,
        progress=lambda part: print(part, file=sys.stderr),
    )
    found.notes += noticed(sources)
    command = shlex.join(["trivium", *sys.argv[1:]])
    page = out / "report.html"
    data_report.write(page, found, {each.name: each for each in train} | held_out, views.decode, command)
    content = {"schema": 1, "command": command, **found.as_json()}
    write_whole(out / "report.json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    _summarise(found, tree.train.workers)
    print(f"report: {page}")


def _inputs(recipe: FlavaRecipe, sources: Sources) -> tuple[Views, int, Tokenizer]:
    """What a run makes of a picture and of a text; the side of a patch."""
    from trivium.data.views import Views
    from trivium.load import load, load_image_tokenizer
    from trivium.models.flava import Flava
    from trivium.recipes import limits
    from trivium.recipes.data import make_tokenizer
    from trivium.train.config import leaves

    limits.check(leaves(recipe))
    data, model = recipe.data, recipe.model
    start = None if recipe.init is None else load(recipe.init)
    image_tokenizer = None if start is None else start.image_tokenizer
    if start is not None and isinstance(start.model, Flava):
        model = start.model.config
    views = Views(model.image_size, crop_scale=data.crop_scale, flip=data.flip)
    if image_tokenizer is None and data.image_tokenizer != "patches":
        image_tokenizer = load_image_tokenizer(data.image_tokenizer)
    if image_tokenizer is not None and data.codes is None:
        codebook_size = image_tokenizer.input_size(model.image_size, model.patch_size)
        views = views if codebook_size == views.size else replace(views, codebook_size=codebook_size)
    if start is not None and start.tokenizer is not None:
        return views, model.patch_size, start.tokenizer
    if sources.pairs is None and sources.text is None:  # nothing to learn a vocabulary from, nor anything to read
        data = replace(data, vocabulary="bert")
    return views, model.patch_size, make_tokenizer(data, sources, model.vocab_size)


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
