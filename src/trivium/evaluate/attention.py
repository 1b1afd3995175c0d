"""Where a ViT looks: the attention of its last class token over patches, head by head (DINO, figures 1 and 4).

Embedded drawings stand on white, so what is drawn is known without anybody's mask: every pixel that is not white. As in
the paper, the smallest set of patches that holds 60 % of a head's attention is compared with it by the Jaccard index.
Of other pictures the maps alone are drawn: they take no mask.

B pictures, H heads, N patches, S side of the pictures in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trivium.bundle import Bundle
from trivium.data.decode import DecodeError, decode
from trivium.data.embedded import HELD_OUT_STYLE, emoji
from trivium.data.transforms import normalize
from trivium.errors import BadSample
from trivium.evaluate import charts
from trivium.evaluate.embedded import Figure
from trivium.evaluate.results import Results, mean_of
from trivium.train.protocol import Source

MASS = 0.6  # of the attention, that the set of patches holds
ENLARGED = 2  # pictures are shown to the model at so many times its size: a finer map, as the paper's 480 pixels
WHITE = 245  # of 255: from here on, in every channel, a pixel is background
SHOWN = 8  # pictures in the figure
TRIED = 64  # pictures of one's own that are looked at until so many can be read
BATCH = 64
OUTLINE = np.array([255, 64, 32], np.uint8)


@torch.inference_mode()
def maps(bundle: Bundle, pictures: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """The class token's attention over patches, [B, H, n, n] of n x n patches, the sum over them 1; and the pixels that
    the model saw, uint8 [B, 3, S, S]. pictures: uint8 [H, W, 3]."""
    model: Any = bundle.model
    transform = bundle.transform.at(ENLARGED * bundle.transform.size)
    found, seen = [], []
    was_training = model.training
    model.eval()  # neither dropout nor stochastic depth
    for first in range(0, len(pictures), BATCH):
        pixels_BCHW = torch.stack([transform(picture) for picture in pictures[first : first + BATCH]])
        maps_BHLL = model.attention_maps(normalize(pixels_BCHW.to(bundle.device), transform.mean, transform.std))
        over_patches_BHN = maps_BHLL[:, :, 0, 1:].float().cpu()
        found.append(over_patches_BHN / over_patches_BHN.sum(-1, keepdim=True))
        seen.append(pixels_BCHW)
    model.train(was_training)
    side = transform.size // model.config.patch_size
    return torch.cat(found).unflatten(-1, (side, side)), torch.cat(seen)


def holding(maps_BHnn: Tensor, mass: float = MASS) -> Tensor:
    """bool [B, H, n, n]: the smallest set of patches whose attention adds up to at least `mass`."""
    sorted_BHN, order_BHN = maps_BHnn.flatten(2).sort(-1, descending=True)
    before_BHN = sorted_BHN.cumsum(-1) - sorted_BHN
    chosen_BHN = torch.zeros_like(order_BHN, dtype=torch.bool).scatter(-1, order_BHN, before_BHN < mass)
    return chosen_BHN.view(maps_BHnn.shape)


def drawn(pixels_BCHW: Tensor) -> Tensor:
    """bool [B, S, S]: what is not white."""
    return (pixels_BCHW < WHITE).any(1)


def jaccard(maps_BHnn: Tensor, drawn_BSS: Tensor) -> Tensor:
    """Overlap of each head's patches with what is drawn, over their union, in pixels: [B, H]."""
    chosen_BHSS = F.interpolate(holding(maps_BHnn).float(), size=drawn_BSS.shape[1:]).bool()
    both = (chosen_BHSS & drawn_BSS[:, None]).sum((2, 3))
    either = (chosen_BHSS | drawn_BSS[:, None]).sum((2, 3))
    return both / either.clamp(min=1)


def boundaries(bundle: Bundle, untrained: Bundle) -> tuple[Results, list[Figure]]:
    """Object boundaries on the drawings of the held-out style, trained against random start.

    Returns:
        `attention.jaccard.head_1` and so on, `attention.jaccard.random_start.head_1` and so on, `attention.jaccard.all`
        for the share of a picture that is drawn (the index of looking everywhere); and two figures.
    """
    records = [record for record in emoji(HELD_OUT_STYLE) if record.split != "train"]
    pictures, names = [decode(record.image) for record in records], [record.codepoints for record in records]
    maps_BHnn, pixels_BCHW = maps(bundle, pictures)
    drawn_BSS = drawn(pixels_BCHW)
    of_trained_BH = jaccard(maps_BHnn, drawn_BSS)
    of_untrained_BH = jaccard(maps(untrained, pictures)[0], drawn_BSS)
    found: Results = {}
    for prefix, values_BH in (("", of_trained_BH), ("random_start.", of_untrained_BH)):
        for head, values_B in enumerate(values_BH.T, start=1):
            found[f"attention.jaccard.{prefix}head_{head}"] = mean_of(values_B.numpy(), names)
    found["attention.jaccard.all"] = mean_of(drawn_BSS.float().mean((1, 2)).numpy(), names)
    best = of_trained_BH.mean(0).argmax().item()
    rows = {}
    for head in range(of_trained_BH.shape[1]):
        for prefix, title in (("", ""), ("random_start.", ", random start")):
            result = found[f"attention.jaccard.{prefix}head_{head + 1}"]
            rows[f"head {head + 1}{title}"] = (result.value, result.low, result.high)
    everywhere = found["attention.jaccard.all"]
    rows["looking everywhere"] = (everywhere.value, everywhere.low, everywhere.high)
    overlap = Figure(
        "Does it look at the object?",
        f"Jaccard index of the patches that hold {MASS:.0%} of a head's attention with what is drawn, on"
        f" {len(records)} drawings of things and in a style that the model never saw; as high as 100 % only for a head"
        " that looks evenly at the whole object and at nothing else.",
        charts.bars(rows, marked=f"head {best + 1}"),
        "; ".join(f"{name}: {value:.1%}" for name, (value, _, _) in rows.items()),
    )
    chosen = np.random.default_rng(0).permutation(len(records))[:SHOWN].tolist()
    shown = [records[row].name for row in chosen]
    what = "a drawing that the model never saw"
    return found, [_pictures(maps_BHnn[chosen], pixels_BCHW[chosen], what, shown), overlap]


def on_pictures(bundle: Bundle, source: Source) -> Figure | None:
    """The maps of a few pictures that a run was trained on, drawn from anywhere in the source.

    Pictures that cannot be read are passed over: the run has told of them. None: there is no other.
    """
    found, names = [], []
    tried = np.random.default_rng(0).choice(len(source), min(TRIED, len(source)), replace=False)
    for row in tried.tolist():
        try:
            sample = source.read(row, row)
            picture = bundle.transform.decoded(sample["image"])
        except (BadSample, DecodeError):
            continue
        found.append(maps(bundle, [picture]))  # one by one: photographs of patches of 8 have thousands of tokens
        names.append(Path(sample["name"]).name)
        if len(found) == SHOWN:
            break
    if not found:
        return None
    maps_BHnn, pixels_BCHW = (torch.cat(parts) for parts in zip(*found, strict=True))
    return _pictures(maps_BHnn, pixels_BCHW, "a picture that the model was trained on", names)


def _pictures(maps_BHnn: Tensor, pixels_BCHW: Tensor, what: str, names: Sequence[str]) -> Figure:
    """A line for each picture: the picture, then each head's attention; what holds 60 % of it is framed."""
    size = pixels_BCHW.shape[2:]
    shades_BHSS = F.interpolate(maps_BHnn / maps_BHnn.amax((2, 3), keepdim=True), size=size)
    chosen_BHSS = F.interpolate(holding(maps_BHnn).float(), size=size).bool()
    lines = []
    for pixels_CSS, shades_HSS, chosen_HSS in zip(pixels_BCHW, shades_BHSS, chosen_BHSS, strict=True):
        tiles = [pixels_CSS.permute(1, 2, 0).numpy()]
        for shade_SS, chosen_SS in zip(shades_HSS, chosen_HSS, strict=True):
            tile = np.repeat((255 * shade_SS.numpy()[..., None]).astype(np.uint8), 3, axis=2)
            tile[_edge(chosen_SS.numpy())] = OUTLINE
            tiles.append(tile)
        lines.append(np.concatenate(tiles, axis=1))
    return Figure(
        "Where it looks",
        f"Each line: {what}, then the attention of its {maps_BHnn.shape[1]} heads from the"
        f" class token of the last block; red lines enclose the patches that hold {MASS:.0%} of it.",
        charts.png_uri(np.concatenate(lines, axis=0)),
        "attention maps of " + ", ".join(names),
    )


def _edge(chosen_SS: np.ndarray) -> np.ndarray:
    """bool: chosen pixels with a neighbour that is not."""
    padded = np.pad(chosen_SS, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return chosen_SS & ~inner
