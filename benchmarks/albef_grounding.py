"""Does a tiny ALBEF look at what a text means? It is trained on scenes with what is said of them, never on a box.

    python benchmarks/albef_grounding.py --minutes 15 --out runs/grounding
    python benchmarks/albef_grounding.py --sheet SHEETS --model RUN --data.root DATA    # heat maps to look at

Scenes have exact boxes, so pointing is measured on new scenes of the drawings that it saw: the hottest pixel lies
inside the box of what is meant. Beside it a point at random (the share of the picture that the box takes), the middle
of the picture, the same model with random weights, and the choice among the boxes of all objects of the scene. Each
block whose words attend patches is measured; "itc" is the picture's own tower. With --fine-tune the run is then
fine-tuned on the expressions for so many steps (trivium finetune grounding) and measured again. A run that is done is
not repeated, and one that was begun goes on. Writes results/albef_grounding.json and .md.

The second form writes heat maps of photographs of Flickr8k's dev split with their captions into SHEETS. Those are for
research and are not part of this repository.
"""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import side_by_side
from albef_runs import NO_QUEUE, as_json, per_cent, run, tiny_tuning, write_beside
from PIL import Image

from trivium import load
from trivium.bundle import Bundle
from trivium.data.referring import Referring, read_referring
from trivium.data.scene_files import write_scenes
from trivium.data.scene_formats import FIRST_ID, FORMATS
from trivium.data.scene_language import captions
from trivium.data.scenes import Scenes
from trivium.evaluate import grounding
from trivium.evaluate.results import Result
from trivium.explain.heat_maps import heat_wall
from trivium.models.albef import Albef
from trivium.recipes import RECIPES
from trivium.recipes.albef import AlbefRecipe, at_random
from trivium.train import config

SIDE = 128  # pixels of a picture, as scenes have: 8 x 8 patches of 16
FIGURES = ("pointing", "pointing.middle", "pointing.chance", "among_annotated", "among_annotated.chance")
SHOWN = 8  # pictures on a sheet

Case = tuple[str, Bundle, int | None, str]  # a name, and whose attention: of which block, by which score
Found = dict[str, dict[str, Result]]


def make_data(folder: Path, train: int, val: int) -> tuple[list[Path], Referring]:
    """Scenes as RefCOCO has them, and two lists of pictures with texts: expressions, captions."""
    for split, count in (("train", train), ("new-scenes", val)):
        write_scenes(Scenes(split, count, seed=1), folder, ["refcoco"])  # type: ignore[arg-type]
    data = read_referring(folder / "refcoco")
    said: dict[str, list[str]] = {}
    for each in data.good("train"):
        said.setdefault(each.image, []).append(each.text)
    scenes, pictures = Scenes("train", train, seed=1), FORMATS["refcoco"].picture
    described = {
        str(folder / "refcoco" / pictures("train", FIRST_ID["train"] + index)): captions(
            scenes.scene(index), scenes.draws(index)
        )
        for index in range(train)
    }
    paths = []
    for name, texts in (("expressions", said), ("captions", described)):
        paths.append(folder / f"{name}.json")
        rows = [{"image": str(Path(image).absolute()), "caption": each} for image, each in texts.items()]
        paths[-1].write_text(json.dumps(rows))
    return paths, data


def untrained(bundle: Bundle, recipe: AlbefRecipe) -> Bundle:
    """The same model as its run drew it."""
    assert isinstance(bundle.model, Albef)
    model = Albef(bundle.model.config)
    at_random(model, recipe)
    return replace(bundle, model=model.eval())


def each_block(bundle: Bundle) -> list[Case]:
    model = bundle.model
    assert isinstance(model, Albef)
    blocks = model.config.fusion_layers - 1  # in the last one words are cold
    cases: list[Case] = [(f"itm, block {n}", bundle, n, "match") for n in range(blocks)]
    return [*cases, ("itc, last block", bundle, None, "cosine")]


def fine_tuned(start: Path, root: Path, steps: int, device: str, threads: int | None) -> Path:
    """A run on the expressions from there. Its last step counts, so that what is measured chooses none."""
    values = tiny_tuning(steps) | NO_QUEUE | {
        "init": start, "data.root": root, "data.image-size": SIDE, "data.rows": 100
    }  # fmt: skip
    return run(start.with_name(f"{start.name}-tuned-{steps}"), ["finetune", "grounding"], values, device, threads)


def measure(out: Path, tuned: Path | None, recipe: AlbefRecipe, data: Referring, rows: int) -> Found:
    """A line for each block of a run, for random weights at the block that is looked at by default, and for each block
    of what was fine-tuned from the run."""
    bundle = load(out)
    cases = [*each_block(bundle), ("random weights", untrained(bundle, recipe), None, "match")]
    if tuned is not None:
        cases += [(f"fine-tuned: {name}", bundle, block, by) for name, bundle, block, by in each_block(load(tuned))]
    found: Found = {}
    for name, which, block, by in cases:
        results = grounding.run(which, data, block=block, by=by, rows=rows).results  # type: ignore[arg-type]
        found[name] = {figure: results[f"val.{figure}"] for figure in FIGURES}
        print(f"  {name}: " + ", ".join(f"{figure} {each.value:.3f}" for figure, each in found[name].items()))
    return found


def command_of(arguments: argparse.Namespace) -> str:
    """What was asked for, without this machine's folders."""
    flags = f"--minutes {arguments.minutes:g} --scenes {arguments.scenes} --rows {arguments.rows}"
    flags += f" --fine-tune {arguments.fine_tune}" if arguments.fine_tune else ""
    flags += "" if arguments.threads is None else f" --threads {arguments.threads}"
    return f"python benchmarks/albef_grounding.py {flags} --out RUNS"


def page(found: Found, command: str, minutes: float, steps: int) -> str:
    lines = [
        "# Where a tiny ALBEF looks", "", f"`{command}`", "",
        f"Per cent of the expressions on new scenes, with 95 % intervals; one seed. The {minutes:g} minutes of training"
        f" were {steps:,} steps. At this size pretraining has no queue. Expressions of one scene are drawn together.",
        "",
        f"| | {' | '.join(FIGURES)} |", "|---" * (1 + len(FIGURES)) + "|",
    ]  # fmt: skip
    lines += [f"| {name} | {' | '.join(per_cent(row[figure]) for figure in FIGURES)} |" for name, row in found.items()]
    return "\n".join([*lines, ""])


def scene_sheet(bundle: Bundle, data: Referring, path: Path) -> None:
    """A few expressions on new scenes, to look at."""
    chosen = data.good("val")
    heat_wall(bundle, [(each.image, each.text) for each in chosen[:: max(1, len(chosen) // SHOWN)][:SHOWN]]).save(path)


def photographs(root: Path, count: int) -> list[tuple[Image.Image, str]]:
    found: list[tuple[Image.Image, str]] = []
    for file in sorted((root / "flickr8k").glob("dev-*.parquet")):
        for row in pq.read_table(file).to_pylist():
            data = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
            text = row["captions"][0] if isinstance(row["captions"], list) else row["captions"]
            found.append((Image.open(io.BytesIO(data)).convert("RGB"), text))
            if len(found) == count:
                return found
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0, help="of training")
    parser.add_argument("--scenes", type=int, default=8000, help="of training")
    parser.add_argument("--rows", type=int, default=1500, help="expressions that are measured")
    parser.add_argument("--fine-tune", type=int, default=0, help="steps of fine-tuning on expressions")
    parser.add_argument("--out", type=Path, help="a new folder for scenes and run")
    parser.add_argument("--sheet", type=Path, help="a folder for heat maps of photographs")
    parser.add_argument("--model", type=Path, help="whose heat maps; a run or a model folder")
    parser.add_argument("--data.root", dest="root", type=Path, help="the folder that holds flickr8k")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="of torch; by default as torch finds best")
    arguments = parser.parse_args()
    if arguments.sheet is not None:
        if arguments.model is None or arguments.root is None:
            parser.error("--sheet needs --model and --data.root")
        arguments.sheet.mkdir(parents=True, exist_ok=True)
        sheet = heat_wall(load(arguments.model), photographs(arguments.root, SHOWN))
        sheet.save(arguments.sheet / "flickr8k-dev.png")
        print(f"wrote {arguments.sheet / 'flickr8k-dev.png'}")
        return
    if arguments.out is None:
        parser.error("--out DIR is where scenes and run are written")
    minutes, scenes, out = arguments.minutes, arguments.scenes, arguments.out
    lists, data = make_data(out / "scenes", scenes, max(8, scenes // 10))
    values = {
        "size": "tiny", "model.image-size": SIDE, "data.pairs": lists, "train.minutes": minutes,
        "train.save-every": 200, "train.keep-last": 1, "validate": 0,
    }  # fmt: skip
    trained = run(out / f"run-{minutes:g}", ["pretrain", "albef"], values, arguments.device, arguments.threads)
    recipe = config.build(config.load(trained), RECIPES)
    tuned = None
    if arguments.fine_tune:
        root = out / "scenes" / "refcoco"
        tuned = fine_tuned(trained, root, arguments.fine_tune, arguments.device, arguments.threads)
    found = measure(trained, tuned, recipe, data, arguments.rows)
    scene_sheet(load(trained), data, out / "scenes.png")
    print(f"wrote {out / 'scenes.png'}")
    command, steps = command_of(arguments), recipe.train.steps
    numbers = {name: {figure: as_json(each) for figure, each in row.items()} for name, row in found.items()}
    written = side_by_side.write("albef_grounding", numbers, command=command, steps=steps)
    text = page(found, command, minutes, steps)
    write_beside(written.with_suffix(".md"), lambda beside: beside.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
