"""The image tokenizer that the package trains, on the drawings inside it: what its codes keep, how many are used.

    python benchmarks/dvae_embedded.py --out runs/dvae

One run of `trivium pretrain dvae --size tiny` (K = 512), measured on the val split: pictures that went through their
likeliest codes against the mean picture of training, and the share of codes that occur. Beside it a k-means codebook of
as many patches of the same size on the same pictures, which takes half a minute. Wanted: at least 6 dB above the mean
picture, and at least half of the codes used. Exits 1 where one of both is missed. Writes results/dvae_embedded.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import side_by_side
import torch

from trivium.cli import main as trivium
from trivium.data.collate import ImageCollate, ImageInput
from trivium.data.loader import evaluation_batches
from trivium.data.views import Views
from trivium.evaluate import image_tokenizer, results
from trivium.models.patch_codebook import PatchCodebook
from trivium.recipes.dvae import dvae, mean_picture, open_sources

WANTED_DECIBELS, WANTED_USED = 6.0, 0.5
NAMES = (
    *("reconstruction.psnr", "reconstruction.mean_picture_psnr", "reconstruction.gain"),
    *("codes.used", "codes.used_beyond_white", "codes.perplexity", "codes.perplexity_beyond_white"),
)


def k_means() -> results.Results:
    """The same figures for a codebook of patches of the same stride, as many as the dVAE has codes."""
    recipe = dvae("tiny")
    train, held_out = open_sources(recipe.data)
    assert held_out is not None
    whole = ImageCollate(ImageInput(Views(recipe.data.image_size), recipe.model.stride), train=False)

    def pixels(source: object) -> list[torch.Tensor]:
        batches = evaluation_batches(source, whole, 256)  # type: ignore[arg-type]
        return [batch.images[0].pixels_BCHW for batch in batches]

    codebook = PatchCodebook.fit(pixels(train), recipe.model.num_codes, recipe.model.stride)
    return image_tokenizer.run(codebook, pixels(held_out), mean_picture(train, whole)).results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the run; one that is there is measured")
    parser.add_argument("--minutes", type=float, help="of training; without it as many steps as the recipe says")
    arguments, more = parser.parse_known_args()
    if not (arguments.out / "results.json").is_file():
        words = ["pretrain", "dvae", "--size", "tiny", "--out", str(arguments.out), *more]
        if arguments.minutes is not None:
            words += ["--train.minutes", str(arguments.minutes)]
        if code := trivium(words):
            raise SystemExit(code)
    measured = results.read(arguments.out / "results.json")
    found = {"dvae": measured, "k_means": k_means()}
    rows = {name: {each: vars(of[each]) | {"outcomes": None} for each in NAMES} for name, of in found.items()}
    for name, of in found.items():
        print(name, {each: round(of[each].value, 3) for each in NAMES})
    if not more and arguments.minutes is None and side_by_side.is_as(arguments.out, dvae("tiny")):
        side_by_side.write(
            "dvae_embedded",
            rows,
            command="python benchmarks/dvae_embedded.py --out RUN",
            seconds_of_training=measured["seconds.train"].value,
            wanted={"reconstruction.gain": WANTED_DECIBELS, "codes.used": WANTED_USED},
        )
    else:
        print("a trial: results/dvae_embedded.json stays as it is", file=sys.stderr)
    missed = [
        name
        for name, least in (("reconstruction.gain", WANTED_DECIBELS), ("codes.used", WANTED_USED))
        if measured[name].value < least
    ]
    if missed:
        sys.exit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
