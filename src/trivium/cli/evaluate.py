"""`trivium evaluate`: what a model can do, measured and shown on a page."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from trivium.errors import TriviumError
from trivium.hub import is_id


def evaluate(
    path: Path,
    *,
    pairs: Annotated[tuple[str, ...], arg(metavar="PATH ...")] = (),
    image_column: Annotated[str | None, arg(metavar="NAME")] = None,
    text_column: Annotated[str | None, arg(metavar="NAME")] = None,
    suite: Annotated[str | None, arg(metavar="flava35|albef|unit|vision|language|multimodal|own")] = None,
    task: Annotated[tuple[str, ...], arg(metavar="TASK ...")] = (),
    root: Annotated[Path | None, arg(name="data.root", metavar="DIR")] = None,
    fine_tune: bool = False,
    fine_tuned: Annotated[tuple[Path, ...], arg(metavar="RUN ...")] = (),
    rows: Annotated[int | None, arg(metavar="N")] = None,
    block: Annotated[int | None, arg(metavar="N")] = None,
    image_size: Annotated[int | None, arg(metavar="N")] = None,
    ranked: Annotated[int | None, arg(metavar="N")] = None,
    first_word_twice: bool = False,
    out: Path | None = None,
    device: Annotated[str, arg(metavar="auto|cpu|cuda")] = "auto",
) -> int:
    """Measure a model and write results.json and report.html.

    With --suite or --task: on the papers' tasks, as far as their data lies below --data.root; what is not there is
    listed with its layout and its owners. What is done is kept, so that the same call goes on where it stopped.

    Args:
        path: a run folder (its newest sound checkpoint), a model folder, or a checkpoint of another library.
        pairs: captioned pictures of your own to search in (CSV, JSONL, Parquet, tar shards or a folder); without
            them the model is measured on the embedded drawings, and a run on its own validation samples.
        image_column: of --pairs in tables, where it has an unusual name.
        text_column: likewise.
        suite: the tasks of a paper, or of one kind.
        task: tasks by their name in the papers, such as CIFAR10 or "COCO retrieval"; of --suite, or of all suites.
        root: the folder that holds the data sets, each in its official layout or in a copy of it.
        fine_tune: for each task that takes fine-tuning, whose data is there and for which --fine-tuned names no run,
            fine-tune the model with the published settings, in a run folder below --out; the same call goes on.
        fine_tuned: runs of trivium finetune, whose results stand for the tasks that take fine-tuning.
        rows: at most so many pictures of each split of --suite and --task, for a first look; with --fine-tune so many
            training rows, 10 times through them in place of published updates, 0.06 of it warm-up, no batch larger. For
            retrieval and RefCOCO+ all training rows are learned from, and so many are measured.
        block: whose attention RefCOCO+ is measured by, as in trivium ground.
        image_size: pixels on the side of a picture, where not the model's own: its positions are interpolated.
        ranked: of VQAv2, of a model that writes its answers: so many of its list are read to their end, by default as
            the model has it (128).
        first_word_twice: likewise: rank the list as ALBEF's public code does, which counts an answer's first word
            twice.
        out: the folder to write into; by default the run folder, with --pairs the folder "evaluation" in it, with a
            suite "evaluation-SUITE", and for a model that is no run these folders here.
        device: cpu, cuda, or auto for the fastest there is.
    """
    begun = time.perf_counter()
    if not is_id(path) and not path.exists():
        raise TriviumError(f"{path}: there is no such file or folder; give a run, a model folder or a checkpoint")
    for flag, column in (("--image-column", image_column), ("--text-column", text_column)):
        if column is not None and not pairs:
            raise TriviumError(f"{flag} is of the tables of --pairs: name those, or leave it out")
    is_run = (path / "checkpoints").is_dir()
    if suite is not None or task:
        from trivium.cli.evaluate_suite import evaluate_suite

        if pairs:
            raise TriviumError("--pairs and --suite are two evaluations: call trivium evaluate for each")
        out = out or (path if is_run else Path()) / f"evaluation-{suite or 'tasks'}"
        return evaluate_suite(
            path, suite, task, root, fine_tuned, rows, block, image_size, out, device, begun,
            fine_tune=fine_tune, ranked=ranked, first_word_twice=first_word_twice,
        )  # fmt: skip
    of_suites = {
        "data.root": root, "fine-tune": fine_tune or None, "fine-tuned": fine_tuned or None, "rows": rows,
        "block": block, "ranked": ranked, "first-word-twice": first_word_twice or None,
    }  # fmt: skip
    given = [name for name, value in of_suites.items() if value is not None]
    if given:
        raise TriviumError(f"--{given[0]} is of the papers' tasks: name them with --suite or --task")
    own = is_run and not pairs  # what a run measures of itself: its results.json is made anew
    if own and image_size is not None:
        raise TriviumError(
            "--image-size is not of what a run measures of itself, at the size that it learned: give --pairs, --suite"
            " or --task with it, or the model folder of a checkpoint"
        )
    out = out or (path if own else path / "evaluation" if is_run else Path("evaluation"))
    if out.exists() and not out.is_dir():
        raise TriviumError(f"{out} is a file: name a folder with --out")
    from trivium.cli.embed import open_model
    from trivium.data.sources import open_source
    from trivium.evaluate import pairs as pairs_protocol
    from trivium.recipes import RECIPES, finish
    from trivium.recipes.prepared import Losses, on_drawings
    from trivium.train import config, run_folder
    from trivium.train.precision import choose_device

    def say(sentence: str) -> None:
        print(sentence, file=sys.stderr)

    prepared = None
    seconds: dict[str, float] = {}
    if own:
        settings = config.load(path)
        newest = run_folder.newest_sound(path, say)
        if newest is None:
            resume = run_folder.to_resume(path)
            raise TriviumError(f"{path} holds no finished checkpoint yet: train on with `{resume}`")
        seconds["train"] = json.loads((newest / "training" / "state.json").read_text())["seconds"]
        prepared = config.build(settings, RECIPES).prepare(settings.recipe, settings.arguments, newest / "model")
        if chosen := prepared.settle(path):
            say(chosen)
        prepared.run.method.to(choose_device(device))
    losses: Losses = {}
    bundle = open_model(path, image_size, device) if prepared is None else prepared.bundle
    if prepared is not None:
        found, losses = finish.evaluate(prepared, say)
    elif pairs:
        source = open_source("pairs", pairs, image_column=image_column, text_column=text_column)
        found = pairs_protocol.run(bundle, source)
    else:
        found = on_drawings(bundle, say)
    out.mkdir(parents=True, exist_ok=True)
    page = finish.write(
        out,
        found,
        losses,
        bundle=bundle,
        prepared=prepared,
        run=path if own else None,
        seconds=seconds | {"total": time.perf_counter() - begun},
        model_path=str(path),
        title=f"Evaluation of {path}",
    )
    for sentence in finish.summary(found):
        print(sentence)
    print(f"report: {page}")
    return 0
