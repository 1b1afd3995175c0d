"""Pictures a second on one core: from the bytes of a JPEG to the uint8 pixels of a random crop at 224.

    python benchmarks/decode.py            # a minute
    python benchmarks/decode.py --quick    # to see that it runs; writes nothing

Ours is what a worker of the loader does for each picture: decode, draw the crop by place, cut it out, resize it to
224 x 224, channels first. The peer does the same with Pillow alone: decode, crop, resize. Both in one process and one
thread, interleaved. The rows name the side of the stored JPEG and the filter; FLAVA's recipe crops 90 to 100 % of the
area and resizes with the bicubic filter. `sample` adds the rest of what the recipe prepares of a picture: its view of
the image tokenizer, 112 x 112 by Lanczos, which is Pillow's on both sides, and on ours the block mask.

Normalisation is not in it: pixels stay uint8 until they are on the device. The pictures are sums of random waves at all
scales with a little noise. Those of 256 px have about 20 KB, where photographs of that side have 12 to 25: the time of
decoding goes with them.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import side_by_side
import torch
from PIL import Image

from trivium.data import decode as decode_module
from trivium.data import views as views_module
from trivium.data.collate import ImageInput
from trivium.data.order import Draws
from trivium.data.transforms import CropBox, Filter, resize
from trivium.data.views import Views

PICTURES = 32
RECIPE = Views(224)
CODEBOOK = 112  # side of the image tokenizer's view
SHAPES = {"256 px": (256, 341), "384 px": (384, 512), "768 px": (768, 1024)}


def photograph(height: int, width: int, seed: int) -> np.ndarray:
    """Noise at every scale, its amplitude falling with the frequency as in pictures of the world."""
    rng = np.random.default_rng(seed)
    channels = np.zeros((height, width, 3))
    for cells in (4, 8, 16, 32, 64, 128):
        for channel in range(3):
            coarse = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
            channels[..., channel] += (
                np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) * 90 / cells**0.6
            )
    channels += rng.normal(size=channels.shape)
    return np.clip(channels + 120, 0, 255).astype(np.uint8)


def jpegs(height: int, width: int) -> list[bytes]:
    """Half of them upright, half lying."""
    found = []
    for number in range(PICTURES):
        shape = (height, width) if number % 2 else (width, height)
        buffer = io.BytesIO()
        Image.fromarray(photograph(*shape, number)).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def ours(data: list[bytes], views: Views) -> None:
    for place, picture in enumerate(data):
        pixels_HWC = views.decode(picture)
        height, width, _ = pixels_HWC.shape
        view = views.draw(Draws(0, "images", place).generator("crop"), height, width)
        views.for_model(pixels_HWC, view)


def peer(data: list[bytes], views: Views, codebook: bool = False) -> None:
    resampling = Image.Resampling[views.filter.upper()]
    for place, picture in enumerate(data):
        image = Image.open(io.BytesIO(picture)).convert("RGB")
        box = views.draw(Draws(0, "images", place).generator("crop"), image.height, image.width).box
        assert box is not None
        corners = (box.left, box.top, box.left + box.width, box.top + box.height)
        cropped = image.crop(corners)
        sizes = [(views.size, resampling), *([(CODEBOOK, Image.Resampling.LANCZOS)] if codebook else [])]
        for size, filter in sizes:
            np.ascontiguousarray(np.asarray(cropped.resize((size, size), filter)).transpose(2, 0, 1))


def sample(data: list[bytes]) -> None:
    image = ImageInput(replace(RECIPE, codebook_size=CODEBOOK), patch=16)
    for place, picture in enumerate(data):
        image.prepare({"image": picture, "same_image": 0, "name": ""}, Draws(0, "images", place), train=True)


def pillow_resize(picture_HWC: np.ndarray, size: int, box: CropBox | None, filter: Filter) -> np.ndarray:
    return np.ascontiguousarray(resize(picture_HWC, size, box, filter).transpose(2, 0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    if not quick:
        side_by_side.refuse_a_busy_machine()
    torch.set_num_threads(1)
    data = {name: jpegs(*shape)[: 2 if quick else PICTURES] for name, shape in SHAPES.items()}
    rounds = 1 if quick else 15
    cases: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {}
    for name in SHAPES:
        for filter in ("bicubic", "bilinear"):
            views = replace(RECIPE, filter=filter)
            cases[f"{name}, {filter}"] = (partial(ours, data[name], views), partial(peer, data[name], views))
    scaled = replace(RECIPE, scaled_decode=True)
    cases["768 px, bicubic, scaled decode"] = (
        partial(ours, data["768 px"], scaled),
        partial(peer, data["768 px"], RECIPE),
    )
    cases["256 px, bicubic, sample"] = (partial(sample, data["256 px"]), partial(peer, data["256 px"], RECIPE, True))
    results = {}
    for name, (one, other) in cases.items():
        pictures = len(data[name.partition(",")[0]])
        times = side_by_side.interleaved(one, other, rounds)
        row = side_by_side.row([each / pictures for each in times[0]], [each / pictures for each in times[1]])
        row |= {"pictures_per_second": 1 / row["ours"], "peer_pictures_per_second": 1 / row["peer"]}
        results[name] = row
        print(f"  {name}: {1 / row['ours']:.0f} pictures/s, Pillow {1 / row['peer']:.0f}", flush=True)

    def without(module: object, name: str, value: object, views: Views, pictures: list[bytes]) -> None:
        plain = getattr(module, name)
        setattr(module, name, value)
        try:
            ours(pictures, views)
        finally:
            setattr(module, name, plain)

    small, large = data["256 px"], data["768 px"]
    rungs: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "simplejpeg instead of Pillow (256 px)": (
            partial(ours, small, RECIPE),
            partial(without, decode_module, "simplejpeg", None, RECIPE, small),
        ),
        "torch's uint8 resize instead of Pillow's (256 px)": (
            partial(ours, small, RECIPE),
            partial(without, views_module, "crop_and_resize", pillow_resize, RECIPE, small),
        ),
        "scaled decode (768 px; off unless asked for)": (partial(ours, large, scaled), partial(ours, large, RECIPE)),
    }
    ladder: dict[str, float] = {}
    for name, (one, other) in rungs.items():
        ladder |= side_by_side.ladder(one, {name: other}, timed=partial(side_by_side.interleaved, rounds=rounds))
    if not quick:
        side_by_side.write(
            "decode",
            results,
            ladder=ladder,
            filter_of_the_recipe=RECIPE.filter,
            bytes_per_picture={name: statistics.mean(map(len, found)) for name, found in data.items()},
        )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
