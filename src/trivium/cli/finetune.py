"""`trivium finetune`: a trained model, a task, a run folder."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from trivium.cli.overrides import set_overrides
from trivium.errors import TriviumError
from trivium.manifest import write_whole

if TYPE_CHECKING:
    from trivium.train.config import Config

SEEDS = "seeds.json"  # of a folder that holds a run for each


def finetune(
    task: str,
    *,
    init: Annotated[str | None, arg(metavar="PATH")] = None,
    data: Annotated[tuple[str, ...], arg(metavar="PATH ...")] = (),
    out: Path | None = None,
    config: Path | None = None,
    resume: bool = False,
    seeds: int = 1,
    overrides: Mapping[str, Any] | None = None,
) -> int:
    """Fine-tune a trained model for one task, keep the checkpoint that is best on held-out rows, measure it and write
    its predictions. Every field of the recipe is a flag, such as --optim.lr 3e-5, --optim.layer-decay 0.9 or
    --train.patience 3: `trivium finetune sst2 --help` lists them all with what they are for that task.

    Args:
        task: cola, sst2, mrpc, stsb, qqp, mnli, qnli or rte (GLUE), vqav2, snli_ve, hateful_memes,
            visual_entailment, vqa, nlvr2, easy_vqa, daquar, retrieval_flickr30k, retrieval_coco, grounding; or of your
            own tables image_classification, text_classification, text_regression, image_text_classification,
            question_answering, retrieval, text_assignment. With --resume the run folder.
        init: the model: a run, a model folder, or a foreign checkpoint such as a BERT of Hugging Face.
        data: the folder of a published task in its official layout, or your own training tables (CSV, JSONL, ...).
        out: the run folder; by default runs/TASK-DATE. With it RUN/model is the fine-tuned model.
        config: a config.json, or a run folder, whose values count where no flag says otherwise.
        resume: continue the run from its newest sound checkpoint, to the same weights as if never stopped.
        seeds: how many runs, with train.seed, the next, and so on; each has a folder seed-N, and results.json beside
            them holds the median.
        overrides: leaves by their dotted path, such as {"optim.lr": "3e-4"}.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.
    """
    from trivium.cli import pretrain
    from trivium.recipes import RECIPES
    from trivium.train import config as configuration
    from trivium.train import distributed, run_folder

    distributed.start()
    changes = dict(overrides or {})
    if resume:
        of_a_start = {"init": init, "data": data, "out": out, "config": config, "seeds": seeds != 1}
        if given := [name for name, value in of_a_start.items() if value]:
            raise TriviumError(
                f"--resume goes on with a run as it was begun: leave out --{given[0]}, and name its folder alone, as in"
                f" trivium finetune {out or 'RUN'} --resume"
            )
        if (Path(task) / SEEDS).is_file():
            return _all_seeds(Path(task), None, changes)
        if not (Path(task) / "config.json").is_file():
            raise TriviumError(f"--resume needs the run folder, and {task} is none: trivium finetune RUN --resume")
        return pretrain.resume_run(task, None, changes, time.perf_counter())
    if init is not None:
        changes["init"] = init
    if data:
        named = _named(data)
        if twice := named.keys() & changes.keys():
            raise TriviumError(f"--data names what --{min(twice)} names too: give one of them")
        changes |= named
    if "train.steps" in changes:
        changes.setdefault("epochs", "null")
    if seeds < 1:
        raise TriviumError(f"--seeds {seeds}: it must be at least 1")
    settings = configuration.Config("finetune", {"task": task})
    if config is not None:
        settings = configuration.load(config)
        if settings.recipe != "finetune" or settings.arguments.get("task") != task:
            raise TriviumError(f"{config} is no config of the task {task}")
    out = out or Path("runs") / f"{task}-{pretrain.now():%Y%m%d-%H%M%S}"
    if (out / SEEDS).is_file():
        raise TriviumError(
            f"{out} holds runs of several seeds already: continue them with --resume, or name another --out"
        )
    if seeds == 1:
        return pretrain.begin(settings, changes, out, time.perf_counter())
    if distributed.world() > 1:
        raise TriviumError(
            "several seeds are run by one process: leave out --seeds under torchrun, and give --train.seed"
        )
    run_folder.refuse_a_run(out)  # whose results.json the median would replace
    tree = configuration.build(settings, RECIPES)
    if "train.seed" in changes:
        tree = set_overrides(tree, {"train.seed": changes.pop("train.seed")})
    first = tree.train.seed
    write_whole(out / SEEDS, json.dumps(list(range(first, first + seeds))) + "\n")
    try:
        return _all_seeds(out, settings, changes)
    finally:
        if not (out / f"seed-{first}" / "config.json").is_file():  # nothing has begun: the next try starts anew
            (out / SEEDS).unlink()


def _all_seeds(out: Path, settings: Config | None, changes: Mapping[str, Any]) -> int:
    """Begin or continue the run of each seed that `out` lists. settings: of runs that are new; None: as the first has
    them."""
    from trivium.cli import pretrain
    from trivium.train import config as configuration
    from trivium.train import distributed

    folders = {seed: out / f"seed-{seed}" for seed in json.loads((out / SEEDS).read_text(encoding="utf-8"))}
    for seed, folder in folders.items():
        begun = time.perf_counter()
        if (folder / "config.json").is_file():
            code = pretrain.resume_run(str(folder), None, changes, begun)
        else:
            like = settings or configuration.load(next(iter(folders.values())))
            code = pretrain.begin(like, {**changes, "train.seed": str(seed)}, folder, begun)
        alone = distributed.launched() == 1  # else others than the first find its results later, or not at all
        if code or (alone and not (folder / "results.json").is_file()):  # stopped by Ctrl-C, or saved by SIGTERM
            return code
    return _summarise(out, list(folders.values()))


def _named(data: Sequence[str]) -> dict[str, Sequence[str]]:
    """A folder is that of a published task, anything else one's own training tables."""
    folders = [path for path in data if Path(path).is_dir()]
    if not folders:
        return {"data.train": list(data)}
    if len(data) > 1:
        raise TriviumError(f"--data names the folder {folders[0]} and more: give one folder, or tables")
    return {"data.root": [data[0]]}


def _summarise(out: Path, folders: Sequence[Path]) -> int:
    """Median, lowest and highest of each figure over the runs of several seeds. The interval of a median is that of the
    run in the middle (over rows), or the mean of two."""
    from trivium import __version__
    from trivium.evaluate import results
    from trivium.evaluate.results import Result
    from trivium.train import run_folder

    found = [results.read(folder / "results.json") for folder in folders]
    summary = {}
    for name in found[0]:
        runs = sorted((each[name] for each in found if name in each), key=lambda result: result.value)
        if len(runs) == len(found) and not name.startswith("seconds."):
            middle = runs[(len(runs) - 1) // 2 : len(runs) // 2 + 1]
            low, high = (
                None if None in ends else statistics.mean(end for end in ends if end is not None)
                for ends in ([result.low for result in middle], [result.high for result in middle])
            )
            value = statistics.median(result.value for result in runs)
            summary[f"{name}.median"] = Result(value, low, high, middle[0].n)
            summary[f"{name}.lowest"] = Result(runs[0].value)
            summary[f"{name}.highest"] = Result(runs[-1].value)
    command = " ".join(["trivium", *sys.argv[1:]])
    total = sum(each["seconds.total"].value for each in found)
    notes = dict.fromkeys(note for folder in folders for note in results.read_notes(folder / "results.json"))
    results.write(
        out / "results.json", summary, command=command, version=__version__, machine=run_folder.machine(),
        seconds={"total": total}, notes=list(notes),
    )  # fmt: skip
    for name, result in summary.items():
        if name.endswith(".median"):
            print(f"{name.removesuffix('.median')}: {result.value:.4f} in the median of {len(found)} seeds")
    return 0
