"""One tower of FLAVA trained alone: its text encoder on words, its image encoder on patches. A FLAVA run with one loss.

    trivium pretrain mlm --size tiny --data.text lines.txt --out runs/text
    trivium pretrain mim --size tiny --data.images pictures/ --out runs/image
    trivium pretrain flava --init-text runs/text --init-image runs/image ...

What the runs keep is a whole FLAVA whose other parts are as they were drawn.
"""

from __future__ import annotations

from dataclasses import replace

from trivium.recipes.flava import FlavaRecipe, Objectives, flava
from trivium.train.optim import Optim
from trivium.train.run import Train

NOTHING = Objectives(mim=0.0, mlm=0.0, mmm_image=0.0, mmm_text=0.0, itm=0.0, contrastive=0.0)


def mlm(size: str = "tiny") -> FlavaRecipe:
    """FLAVA's text encoder by masked words (supplement B.1: RoBERTa's schedule, 125,000 updates of 2,048 sequences).

    size: as of flava."""
    recipe = replace(flava(size), objectives=replace(NOTHING, mlm=1.0))
    if size == "tiny":
        return replace(recipe, train=replace(recipe.train, steps=1000, save_every=500))
    whole = recipe.model.max_length
    data = replace(recipe.data, batch=2048 if size == "base" else 512, max_length=whole, text_length=None)
    optim = Optim(
        lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, schedule="linear", clip="none",
        warmup=10_000 if size == "base" else 0.08,
    )  # fmt: skip
    return replace(recipe, data=data, optim=optim, train=Train(steps=125_000, micro_batch=64))


def mim(size: str = "tiny") -> FlavaRecipe:
    """FLAVA's image encoder by masked patches, as BEiT (Bao et al., section 3.1: 800 epochs of ImageNet-1k in batches
    of 2,048). size: as of flava.

    Otherwise than there the encoder is FLAVA's, without drop path (0.1), LayerScale and relative positions; and codes
    are those of patches unless --data.image-tokenizer names a dVAE. Codes of a cache (--data.codes) are of pictures
    in their own colours: leave these alone then, with --data.color-jitter 0.
    """
    recipe = replace(flava(size), objectives=replace(NOTHING, mim=1.0))
    if size == "tiny":
        return replace(recipe, train=replace(recipe.train, steps=1000, save_every=500))
    data = replace(
        recipe.data, batch=2048 if size == "base" else 512, crop_scale=(0.08, 1.0), flip=0.5, color_jitter=0.4
    )
    optim = Optim(lr=1.5e-3, betas=(0.9, 0.999), weight_decay=0.05, warmup=10 / 800, final=1e-5 / 1.5e-3, clip_norm=3.0)
    return replace(recipe, data=data, optim=optim, train=Train(steps=500_000, micro_batch=128))
