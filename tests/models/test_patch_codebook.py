from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from trivium.models import patch_codebook
from trivium.models.patch_codebook import PatchCodebook, patches_of


def pictures(number: int, side: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (number, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@given(P=st.integers(1, 4), h=st.integers(1, 4), w=st.integers(1, 4), seed=st.integers(0, 99))
def test_encoding_finds_the_nearest_centre_by_the_plain_formula(P: int, h: int, w: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codebook = PatchCodebook(7, P).double()
    codebook.centres.copy_(torch.rand(7, 3 * P * P, generator=generator))
    pixels = torch.rand(2, 3, h * P, w * P, dtype=torch.float64, generator=generator)
    codes = codebook.encode(pixels)
    for b in range(2):
        for n in range(h * w):
            top, left = n // w * P, n % w * P
            patch = pixels[b, :, top : top + P, left : left + P].reshape(-1)
            assert codes[b, n] == (codebook.centres - patch).square().sum(1).argmin()


@given(P=st.integers(1, 4), side=st.integers(1, 4))
def test_decoding_lays_the_centres_out_as_a_picture(P: int, side: int) -> None:
    """As many distinct patches as codes: the picture comes back."""
    pixels = torch.rand(1, 3, side * P, side * P)
    codebook = PatchCodebook(side**2, P)
    codebook.centres.copy_(patches_of(pixels, P))
    assert torch.equal(codebook.decode(codebook.encode(pixels)), pixels)
    assert codebook.encode(pixels).tolist() == [list(range(side**2))]
    codes = torch.arange(side**2).flip(0)[None]
    assert torch.equal(codebook.encode(codebook.decode(codes)), codes)


def test_fit_finds_clusters_that_are_there() -> None:
    """Twelve flat colours with a little noise: one centre each, which k-means from random seeds would often miss."""
    generator = torch.Generator().manual_seed(1)
    colours = torch.tensor([(r, g, b) for r in (30, 120, 220) for g in (40, 200) for b in (40, 200)])
    chosen = torch.randint(0, 12, (400,), generator=generator)
    noise = torch.randint(-5, 6, (400, 3, 4, 4), generator=generator)
    pixels = (colours[chosen][:, :, None, None] + noise).to(torch.uint8)
    codebook = PatchCodebook.fit(pixels, 12, 4)
    codes = codebook.encode(pixels.float() / 255)[:, 0]
    pairs = torch.stack([chosen, codes], 1).unique(dim=0)
    assert len(pairs) == 12
    means = codebook.centres.view(12, 3, 16).mean(2) * 255
    assert (means[pairs[:, 1]] - colours[pairs[:, 0]]).abs().max() < 2


def test_fit_is_equal_for_equal_seeds_and_takes_batches_or_one_tensor() -> None:
    pixels = pictures(60, 16)
    first = PatchCodebook.fit(pixels, 20, 8, iterations=3, seed=5)
    again = PatchCodebook.fit(iter(pixels.split(7)), 20, 8, iterations=3, seed=5)
    other = PatchCodebook.fit(pixels, 20, 8, iterations=3, seed=6)
    assert torch.equal(first.centres, again.centres)
    assert not torch.equal(first.centres, other.centres)


def test_more_iterations_fit_better() -> None:
    pixels = pictures(200, 8)
    smooth = torch.nn.functional.avg_pool2d(pixels.float(), 3, 1, 1).to(torch.uint8)

    def error(iterations: int) -> float:
        codebook = PatchCodebook.fit(smooth, 16, 8, iterations=iterations)
        drawn = codebook.decode(codebook.encode(smooth.float() / 255))
        return (drawn - smooth.float() / 255).square().mean().item()

    assert error(8) < error(0)


def test_a_dead_centre_moves_to_the_patch_that_is_served_worst() -> None:
    patches = torch.tensor([[0.0], [0.1], [0.2], [0.9]]).expand(-1, 3)
    centres = torch.tensor([[0.1], [5.0]]).expand(-1, 3)  # nothing is nearest to the second
    moved = patch_codebook._moved(patches, centres)
    assert torch.allclose(moved[0], torch.full((3,), 0.3))  # the mean of all
    assert torch.equal(moved[1], patches[3])


def test_fewer_distinct_patches_than_codes() -> None:
    flat = torch.full((10, 3, 8, 8), 7, dtype=torch.uint8)
    codebook = PatchCodebook.fit(flat, 6, 4)
    assert codebook.centres.isfinite().all()
    assert torch.allclose(codebook.decode(codebook.encode(flat.float() / 255)), flat.float() / 255, atol=1e-6)


def test_codes_do_not_depend_on_how_many_are_compared_at_once(monkeypatch: object) -> None:
    codebook = PatchCodebook.fit(pictures(20, 16), 30, 4, iterations=1)
    pixels = pictures(3, 16, seed=2).float() / 255
    expected = codebook.encode(pixels)
    monkeypatch.setattr(patch_codebook, "ROWS_AT_ONCE", 5)  # type: ignore[attr-defined]
    assert torch.equal(codebook.encode(pixels), expected)
    assert codebook.input_size(64, 16) == 16
