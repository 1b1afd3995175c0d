"""What each small recipe takes and gives on the data inside the package: the figures of docs/how-to.md.

    python benchmarks/recipes.py --out runs/recipes       # about an hour on one thread

CLIP, the text encoder by masked words, the image encoder by masked patches, and FLAVA's three stages, each by its
command with `--size tiny` and one seed. A run that is finished is taken as it is. DINO and the dVAE have files of their
own (dino_knn.py, dvae_embedded.py), the ablation its table. Writes results/recipes.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import side_by_side

from trivium.cli import main as trivium
from trivium.evaluate import results

ONE_THREAD = ("--train.threads", "1")
COMMANDS: dict[str, tuple[str, ...]] = {
    "clip": ONE_THREAD,
    "mlm": ONE_THREAD,
    "mim": ONE_THREAD,
    "flava-stages": (*ONE_THREAD, "--text.train.threads", "1", "--dino.train.threads", "1"),
}
STAGES = ("text", "dino", "joint")  # each a run of its own below that of flava-stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the runs")
    out: Path = parser.parse_args().out
    found = {}
    for recipe, words in COMMANDS.items():
        runs = {recipe: out / recipe}
        if recipe == "flava-stages":
            runs = {f"{recipe}: {stage}": out / recipe / stage for stage in STAGES}
        if not all((run / "results.json").is_file() for run in runs.values()):
            begun = (out / recipe / "config.json").is_file()
            asked = [str(out / recipe), "--resume"] if begun else [recipe, "--out", str(out / recipe), *words]
            if code := trivium(["pretrain", *asked]):
                raise SystemExit(code)
        for name, run in runs.items():
            found[name] = {each: result.as_json() for each, result in results.read(run / "results.json").items()}
            print(f"{name}: {results.read(run / 'results.json')['seconds.train'].value / 60:.1f} minutes of training")
    side_by_side.write(
        "recipes", found, command="python benchmarks/recipes.py --out RUNS",
        commands={name: " ".join(["trivium pretrain", name, *words]) for name, words in COMMANDS.items()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
