"""What an image tokenizer keeps of pictures, and how many of its codes it uses for that. Of any kind that can decode.

* ``reconstruction.psnr``   peak signal-to-noise ratio, in dB, of pictures that went through their likeliest codes:
  10 log10(1 / e), e the squared error of pixels in [0, 1], its mean over all pictures
* ``reconstruction.mean_picture_psnr``   the same for one picture, the mean of those of training, shown for all
* ``reconstruction.gain``   the difference, with the interval of the difference
* ``codes.used``   share of the codes that occur in these pictures; ``codes.used_beyond_white`` in their patches that
  are not white paper altogether. A code that occurs once counts as one that occurs a thousand times, so beside both
* ``codes.perplexity``, ``codes.perplexity_beyond_white``   e to the entropy of the codes: how many are used as evenly

Intervals draw pictures again; shares of codes have none, since a code that was not drawn is not one that is not used.
B pictures, C channels, H height, W width, N codes of a picture (row-major), K codes there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trivium.errors import TriviumError
from trivium.evaluate import charts
from trivium.evaluate.embedded import Evaluation, Figure
from trivium.evaluate.results import Result, Results, bootstrap
from trivium.models.image_tokenizer import ImageTokenizer

BATCH = 64
SHOWN = 12  # pictures on a page
SHOWN_SIDE = 64  # pixels, at least about
WHITE = 255


@torch.inference_mode()
def run(tokenizer: ImageTokenizer, pictures: Iterable[Tensor], mean_CHW: Tensor) -> Evaluation:
    """Encode and decode held-out pictures.

    Args:
        tokenizer: one that decodes.
        pictures: batches uint8 [B, 3, H, W] of one size, a multiple of the stride.
        mean_CHW: the mean picture of training, in [0, 1].

    Raises:
        TriviumError: it has no decoder.
    """
    errors, of_mean = [], []
    counts_K, beyond_white_K = (torch.zeros(tokenizer.num_codes, dtype=torch.int64) for _ in range(2))
    shown = _Shown()
    device = next(iter(tokenizer.state_dict().values())).device
    for pixels_BCHW in pictures:
        original_BCHW = pixels_BCHW.to(device) / 255
        codes_BN = tokenizer.encode(original_BCHW)
        h, w = (side // tokenizer.stride for side in pixels_BCHW.shape[2:])
        decoded_BCHW = tokenizer.decode(codes_BN.view(-1, h, w))
        if decoded_BCHW is None:
            raise TriviumError("this image tokenizer has no decoder, so its codes cannot be shown as pictures")
        errors.append((decoded_BCHW.clamp(0, 1) - original_BCHW).square().mean((1, 2, 3)).double().cpu())
        of_mean.append((mean_CHW.to(device) - original_BCHW).square().mean((1, 2, 3)).double().cpu())
        painted_B1HW = (pixels_BCHW != WHITE).any(1, keepdim=True).float()
        painted_BN = F.max_pool2d(painted_B1HW, tokenizer.stride).flatten(1) > 0
        codes_BN = codes_BN.cpu()
        counts_K += codes_BN.flatten().bincount(minlength=tokenizer.num_codes)
        beyond_white_K += codes_BN[painted_BN].bincount(minlength=tokenizer.num_codes)
        shown.add(pixels_BCHW, (decoded_BCHW.clamp(0, 1) * 255).round().to(torch.uint8).cpu())
    if not errors:
        raise TriviumError("there are no pictures to measure an image tokenizer on")
    found = Evaluation()
    found.results |= _fidelity(torch.cat(errors).numpy(), torch.cat(of_mean).numpy())
    found.results |= _usage("", counts_K) | _usage("_beyond_white", beyond_white_K)
    found.headline = [
        f"Held-out pictures that went through their codes: {fidelity(found.results)}.",
        f"In them {usage(found.results)}.",
    ]
    originals_BCHW, drawn_BCHW = shown.evenly()
    found.figures = [
        Figure(
            "What the codes keep",
            f"Above held-out pictures, below what is drawn from their codes: one of {tokenizer.num_codes:,} for every"
            f" {tokenizer.stride} x {tokenizer.stride} pixels. All pictures together: {fidelity(found.results)}.",
            charts.png_uri(_two_rows(originals_BCHW, drawn_BCHW)),
            "Held-out pictures in one row and their reconstructions in a second",
        ),
        Figure(
            "How often each code is used",
            f"In held-out pictures, the most frequent first. {usage(found.results)}.",
            charts.frequencies(counts_K.sort(descending=True).values.tolist()),
            "Curve of the number of uses over the rank of the code",
        ),
    ]
    return found


class _Shown:
    """Pictures for the page, evenly spread over all that come by, however many: every so manyth is kept, and when they
    are too many every second of those."""

    def __init__(self) -> None:
        self.every, self.seen = 1, 0
        self.kept: list[tuple[int, Tensor, Tensor]] = []  # number, original and decoded, uint8 [3, H, W]

    def add(self, originals_BCHW: Tensor, decoded_BCHW: Tensor) -> None:
        for original_CHW, decoded_CHW in zip(originals_BCHW, decoded_BCHW, strict=True):
            if self.seen % self.every == 0:
                self.kept.append((self.seen, original_CHW.clone(), decoded_CHW.clone()))
            self.seen += 1
            if len(self.kept) > 2 * SHOWN:
                self.every *= 2
                self.kept = [each for each in self.kept if each[0] % self.every == 0]

    def evenly(self) -> tuple[Tensor, Tensor]:
        number = min(SHOWN, len(self.kept))
        chosen = [self.kept[place * len(self.kept) // number] for place in range(number)]
        return torch.stack([original for _, original, _ in chosen]), torch.stack([drawn for *_, drawn in chosen])


def fidelity(results: Results) -> str:
    """What a reconstruction is worth, for a page or a terminal."""
    kept, mean = (results[f"reconstruction.{name}"] for name in ("psnr", "mean_picture_psnr"))
    return f"{kept.value:.1f} dB (peak signal-to-noise), where the mean picture of training has {mean.value:.1f} dB"


def usage(results: Results) -> str:
    """How many codes are used, for a page or a terminal."""
    sentence = (
        f"{100 * results['codes.used'].value:.0f} % of the codes occur, as evenly as"
        f" {results['codes.perplexity'].value:.0f} codes would"
    )
    if "codes.used_beyond_white" not in results:
        return sentence
    return (
        f"{sentence}; in patches that are not all white {100 * results['codes.used_beyond_white'].value:.0f} % occur,"
        f" as evenly as {results['codes.perplexity_beyond_white'].value:.0f}"
    )


def _two_rows(above_BCHW: Tensor, below_BCHW: Tensor) -> np.ndarray:
    """One picture uint8 [2 H + gap, B W + gaps, 3], enlarged to be seen."""
    rows = [F.pad(pictures, (2, 2, 2, 2), value=WHITE) for pictures in (above_BCHW, below_BCHW)]
    whole_CHW = torch.cat([torch.cat(list(pictures), dim=2) for pictures in rows], dim=1)
    times = max(1, SHOWN_SIDE // above_BCHW.shape[-1])
    return whole_CHW.repeat_interleave(times, 1).repeat_interleave(times, 2).permute(1, 2, 0).numpy()


def psnr(mean_squared_error: float) -> float:
    """dB, of pixels in [0, 1]; 100 where nothing was lost, since infinities have no intervals."""
    return min(100.0, -10 * math.log10(mean_squared_error)) if mean_squared_error else 100.0


def _fidelity(errors_B: np.ndarray, of_mean_B: np.ndarray) -> Results:
    def result(statistic: Callable[[np.ndarray], float]) -> Result:
        everything = np.arange(len(errors_B))
        return Result(statistic(everything), *bootstrap(statistic, len(errors_B)), n=len(errors_B))

    return {
        "reconstruction.psnr": result(lambda rows: psnr(errors_B[rows].mean())),
        "reconstruction.mean_picture_psnr": result(lambda rows: psnr(of_mean_B[rows].mean())),
        "reconstruction.gain": result(lambda rows: psnr(errors_B[rows].mean()) - psnr(of_mean_B[rows].mean())),
    }


def _usage(where: str, counts_K: Tensor) -> Results:
    num_patches = int(counts_K.sum())
    if not num_patches:  # pictures that are white altogether
        return {}
    entropy = float(torch.special.entr(counts_K / num_patches).sum())
    return {
        f"codes.used{where}": Result(float((counts_K > 0).float().mean()), n=num_patches),
        f"codes.perplexity{where}": Result(math.exp(entropy), n=num_patches),
    }
