"""What an image tokenizer keeps, on pictures whose figures are known."""

from __future__ import annotations

import base64
import math

import pytest
import torch
from torch import Tensor

from trivium.data.decode import decode
from trivium.errors import TriviumError
from trivium.evaluate import image_tokenizer
from trivium.models.dvae import DVae, DVaeConfig
from trivium.models.patch_codebook import PatchCodebook

GREYS = torch.tensor([0, 51, 102, 255], dtype=torch.uint8)


def codebook() -> PatchCodebook:
    """Codes 0 to 2 are grey patches of 4 pixels, 3 is white, and 4 and 5 stand for nothing."""
    found = PatchCodebook(6, 4)
    found.centres[:4] = (GREYS.float() / 255)[:, None]
    found.centres[4:] = 7.0
    return found


def tiles(codes: Tensor) -> Tensor:
    """Pictures uint8 [B, 3, 4 h, 4 w] of whole grey patches."""
    return GREYS[codes].repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand(-1, 3, -1, -1)


def test_pictures_of_its_own_patches_are_kept_whole_and_counted() -> None:
    codes = torch.tensor([[[0, 3], [3, 3]], [[1, 3], [0, 3]]])
    found = image_tokenizer.run(codebook(), [tiles(codes[:1]), tiles(codes[1:])], torch.full((3, 8, 8), 0.5))
    results = found.results
    assert results["reconstruction.psnr"].value == 100
    of_mean = ((GREYS[codes].double() / 255 - 0.5) ** 2).mean()
    assert results["reconstruction.mean_picture_psnr"].value == pytest.approx(-10 * math.log10(of_mean))
    assert results["codes.used"].value == pytest.approx(3 / 6)
    assert results["codes.used_beyond_white"].value == pytest.approx(2 / 6)
    assert results["codes.used_beyond_white"].n == 3
    assert results["codes.perplexity"].value == pytest.approx(
        math.exp(-sum(p * math.log(p) for p in (5 / 8, 2 / 8, 1 / 8))), rel=1e-6
    )
    assert "50 % of the codes occur" in image_tokenizer.usage(results)
    assert "33 % occur, as evenly as 2" in image_tokenizer.usage(results)


def test_the_page_shows_pictures_above_what_their_codes_draw() -> None:
    pictures = tiles(torch.tensor([[[1, 3], [3, 3]], [[1, 3], [2, 3]]])) - 3  # the nearest codes are 3 brighter
    found = image_tokenizer.run(codebook(), [pictures], torch.zeros(3, 8, 8))
    kept, used = found.figures
    shown = decode(base64.b64decode(kept.image.removeprefix("data:image/png;base64,")))
    side = (8 + 2 * 2) * (64 // 8)
    assert shown.shape == (2 * side, 2 * side, 3)
    inside = slice(2 * 8, -2 * 8)
    above, below = shown[:side, :side][inside, inside].astype(int), shown[side:, :side][inside, inside].astype(int)
    assert (below - above == 3).all()
    assert used.image.startswith("data:image/svg+xml")


def test_pictures_of_the_page_are_spread_over_all_and_few_are_kept() -> None:
    shown = image_tokenizer._Shown()
    for first in range(0, 1000, 10):
        numbers = torch.arange(first, first + 10).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
        shown.add(numbers, -numbers)
        assert len(shown.kept) <= 2 * image_tokenizer.SHOWN + 1
    originals, drawn = shown.evenly()
    numbers = originals[:, 0, 0, 0]
    assert torch.equal(originals, -drawn) and len(numbers) == image_tokenizer.SHOWN
    assert numbers[0] == 0 and numbers[-1] > 850
    assert numbers.diff().min() > 0 and numbers.diff().max() <= 2 * 1000 / image_tokenizer.SHOWN


def test_what_is_lost_is_the_mean_squared_error_of_all_pixels() -> None:
    """Two pictures, one kept and one 10 / 255 off: the mean is taken before the logarithm."""
    pictures = tiles(torch.tensor([[[0]], [[1]]]))
    pictures = torch.stack([pictures[0], pictures[1] + 10])
    found = image_tokenizer.run(codebook(), [pictures], torch.zeros(3, 4, 4)).results
    assert found["reconstruction.psnr"].value == pytest.approx(-10 * math.log10((10 / 255) ** 2 / 2))
    assert found["reconstruction.gain"].value == pytest.approx(
        found["reconstruction.psnr"].value - found["reconstruction.mean_picture_psnr"].value
    )
    low, high = found["reconstruction.psnr"].low, found["reconstruction.psnr"].high
    assert low == pytest.approx(-10 * math.log10((10 / 255) ** 2))
    assert high == 100


def test_a_tokenizer_without_decoder_and_no_pictures_are_refused() -> None:
    with pytest.raises(TriviumError, match="no decoder"):
        image_tokenizer.run(DVae(DVaeConfig(width=4, num_codes=3)), [torch.zeros(1, 3, 8, 8)], torch.zeros(3, 8, 8))
    with pytest.raises(TriviumError, match="no pictures"):
        image_tokenizer.run(codebook(), [], torch.zeros(3, 4, 4))


def test_pictures_of_white_alone_have_no_figure_beyond_white() -> None:
    found = image_tokenizer.run(codebook(), [tiles(torch.full((3, 2, 2), 3))], torch.zeros(3, 8, 8)).results
    assert found["codes.perplexity"].value == pytest.approx(1)
    assert "codes.used_beyond_white" not in found
