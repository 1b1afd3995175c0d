"""The code cache: equal to codes made on the spot, resumed where it stopped, refused where it does not fit."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import DrawnSource, drawn_picture, tokenizer
from torch import Tensor

from trivium.data import codes
from trivium.data.codes import CodeCache, build, picture_digest
from trivium.data.collate import ImageCollate, ImageInput, PairCollate, TextInput
from trivium.data.mixture import StreamMixture
from trivium.data.views import Views
from trivium.errors import BadSample, TriviumError
from trivium.train.protocol import Batch, Stream

VIEWS = Views(size=16, codebook_size=8, crop_scale=(0.4, 1.0), flip=0.5)
HASH = "sha256-of-the-tokenizer"


def encode(pixels_BCHW: Tensor) -> Tensor:
    """One code for each 2 x 2 patch: its mean brightness and colour, so that any shift of a crop shows."""
    assert pixels_BCHW.dtype == torch.uint8
    patches = torch.nn.functional.avg_pool2d(pixels_BCHW.float(), 2).flatten(2)  # [B, 3, 16]
    return (patches[:, 0] * 7 + patches[:, 1] * 31 + patches[:, 2]).round().long()


@pytest.fixture
def cache_path(tmp_path: Path) -> Path:
    path = tmp_path / "codes.safetensors"
    assert build(DrawnSource(30), VIEWS, encode, HASH, path, crops=3, batch=7, rows_per_part=8) == []
    return path


def run(images: ImageInput, workers: int = 0) -> list[Batch]:
    mixture = StreamMixture([Stream("images", DrawnSource(30), ImageCollate(images), 10, 5)], seed=0, workers=workers)
    return [batch for step in mixture.loader(0, 0, 1, 9) for batch in step]


def test_cached_codes_are_those_of_the_crop_that_is_seen(cache_path: Path) -> None:
    """The codebook's view of a batch, encoded online, gives the codes of the cache."""
    cache = CodeCache(cache_path, VIEWS, HASH)
    seen = set()
    for batch in run(ImageInput(VIEWS, patch=4, codes=cache)):
        for row, pixels_CHW, codes_N in zip(
            batch.images[0].same_B.tolist(), batch.images[0].pixels_BCHW, batch.targets["codes"], strict=True
        ):
            data = drawn_picture(row)
            picture = VIEWS.decode(data)
            views = [VIEWS.numbered(picture_digest(data), number, 20, 24) for number in range(1, 4)]
            shown = [np.array_equal(VIEWS.for_model(picture, view), pixels_CHW.numpy()) for view in views]
            number = shown.index(True)
            online = encode(torch.from_numpy(VIEWS.for_codebook(picture, views[number]))[None])[0]
            assert torch.equal(codes_N, online)
            seen.add(number)
    assert seen == {0, 1, 2}


def test_evaluation_uses_the_whole_picture(cache_path: Path) -> None:
    cache = CodeCache(cache_path, VIEWS, HASH)
    for row in (0, 13, 29):
        data = drawn_picture(row)
        whole = torch.from_numpy(
            replace(VIEWS, crop_scale=(1.0, 1.0)).for_codebook(VIEWS.decode(data), VIEWS.numbered(b"", 0, 20, 24))
        )
        assert np.array_equal(cache.lookup(picture_digest(data), 0, "x"), encode(whole[None])[0].numpy())


def test_with_a_cache_workers_change_nothing_and_no_second_view_is_made(cache_path: Path) -> None:
    images = ImageInput(VIEWS, patch=4, codes=CodeCache(cache_path, VIEWS, HASH))
    for first, second in zip(run(images), run(images, workers=2), strict=True):
        assert len(first.images) == 1
        assert torch.equal(first.images[0].pixels_BCHW, second.images[0].pixels_BCHW)
        assert torch.equal(first.targets["codes"], second.targets["codes"])


def test_a_build_goes_on_where_it_stopped(tmp_path: Path, cache_path: Path) -> None:
    calls = 0

    def breaks(pixels_BCHW: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KeyboardInterrupt
        return encode(pixels_BCHW)

    out = tmp_path / "again.safetensors"
    with pytest.raises(KeyboardInterrupt):
        build(DrawnSource(30), VIEWS, breaks, HASH, out, crops=3, batch=7, rows_per_part=8)
    assert not out.exists()
    finished = len(list((tmp_path / "again.safetensors.parts").iterdir()))
    assert finished == 2
    calls = 100
    build(DrawnSource(30), VIEWS, breaks, HASH, out, crops=3, batch=7, rows_per_part=8)
    assert calls - 100 == 2 * 5 - 1  # of 30 rows 14 were left: 32 and 24 views in batches of 7
    assert out.read_bytes() == cache_path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.safetensors", "codes.safetensors"]


def test_a_changed_setting_does_not_take_over_old_parts(tmp_path: Path, cache_path: Path) -> None:
    def stops(pixels_BCHW: Tensor) -> Tensor:
        if len(list((tmp_path / "again.safetensors.parts").iterdir())) == 2:
            raise KeyboardInterrupt
        return encode(pixels_BCHW)

    out = tmp_path / "again.safetensors"
    with pytest.raises(KeyboardInterrupt):
        build(DrawnSource(30), replace(VIEWS, flip=0.0), stops, "another", out, crops=3, rows_per_part=8)
    build(DrawnSource(30), VIEWS, encode, HASH, out, crops=3, rows_per_part=8)
    assert out.read_bytes() == cache_path.read_bytes()


def test_unreadable_and_doubled_pictures(tmp_path: Path) -> None:
    class Doubled(DrawnSource):
        def read(self, image_row: int, text_row: int) -> dict[str, object]:
            return super().read(image_row % 5, text_row)

    source = Doubled(12, bad_image=frozenset({2}), bad_text=frozenset({9}))
    skipped = build(source, VIEWS, encode, HASH, tmp_path / "c.safetensors", crops=1, rows_per_part=5)
    assert len(skipped) == 3  # rows 2 and 7 show a cut picture, row 9 has no text
    assert any(why.startswith("drawn.csv (line 2): ") for why in skipped)
    assert len(CodeCache(tmp_path / "c.safetensors", VIEWS, HASH)) == 4
    with pytest.raises(TriviumError, match="no picture could be read"):
        build(DrawnSource(2, bad_image=frozenset({0, 1})), VIEWS, encode, HASH, tmp_path / "none.safetensors")


def test_what_does_not_fit_is_refused(tmp_path: Path, cache_path: Path) -> None:
    with pytest.raises(TriviumError, match=r"codes\.safetensors was made with tokenizer = 'sha256-of-the-tokenizer'"):
        CodeCache(cache_path, VIEWS, "another")
    with pytest.raises(TriviumError, match=r"was made with size = 8, but this run has 4"):
        CodeCache(cache_path, replace(VIEWS, codebook_size=4), HASH)
    with pytest.raises(TriviumError, match="crop_scale"):
        CodeCache(cache_path, replace(VIEWS, crop_scale=(0.9, 1.0)), HASH)
    CodeCache(cache_path, replace(VIEWS, size=64), HASH)  # the model's own size decides no code
    cache = CodeCache(cache_path, VIEWS, HASH)
    with pytest.raises(TriviumError, match="has 16 codes a picture, but the model has 64 patches"):
        ImageInput(VIEWS, patch=2, codes=cache)
    with pytest.raises(BadSample, match=r"x\.csv \(line 4\): the code cache .* does not hold this picture"):
        cache.lookup(picture_digest(b"unknown"), 1, "x.csv (line 4)")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(cache_path.read_bytes()[:-10])
    for path in (cut, tmp_path / "absent.safetensors"):
        with pytest.raises(TriviumError, match="cannot be read"):
            CodeCache(path, VIEWS, HASH)
    with pytest.raises(TriviumError, match="at most 65,536 codes"):
        build(DrawnSource(2), VIEWS, lambda pixels: encode(pixels) + 70_000, HASH, tmp_path / "large.safetensors")


def test_pictures_that_the_cache_lacks_are_replaced_and_too_many_end_the_run(tmp_path: Path) -> None:
    build(DrawnSource(20), VIEWS, encode, HASH, tmp_path / "few.safetensors", crops=2)
    images = ImageInput(VIEWS, patch=4, codes=CodeCache(tmp_path / "few.safetensors", VIEWS, HASH))
    batches = run(images)
    assert {int(row) for batch in batches for row in batch.images[0].same_B} == set(range(20))
    sentences = [why for batch in batches for why in batch.bad]
    assert len(sentences) >= 30  # rows 20 to 29, in three epochs
    assert all("does not hold this picture: build it again" in why for why in sentences)
    mixture = StreamMixture([Stream("images", DrawnSource(30, height=21), ImageCollate(images), 10, 5)], seed=0)
    with pytest.raises(TriviumError, match=r"20 samples in a row could not be read.*few\.safetensors does not hold"):
        next(mixture.loader(0, 0, 1, 1))


def test_a_cache_travels_to_other_processes(cache_path: Path) -> None:
    cache = CodeCache(cache_path, VIEWS, HASH)
    other = pickle.loads(pickle.dumps(cache))
    digest = picture_digest(drawn_picture(3))
    assert np.array_equal(cache.lookup(digest, 2, "x"), other.lookup(digest, 2, "x"))


def test_a_digest_may_end_in_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of one picture in 256 does."""
    monkeypatch.setattr(codes, "picture_digest", lambda data: picture_digest(data)[:30] + b"\0\0")
    build(DrawnSource(5), VIEWS, encode, HASH, tmp_path / "c.safetensors", crops=1)
    cache = CodeCache(tmp_path / "c.safetensors", VIEWS, HASH)
    assert len(cache) == 5
    for row in range(5):
        digest = codes.picture_digest(drawn_picture(row))
        pixels_CHW = VIEWS.for_codebook(VIEWS.decode(drawn_picture(row)), VIEWS.numbered(digest, 1, 20, 24))
        assert np.array_equal(cache.lookup(digest, 1, "x"), encode(torch.from_numpy(pixels_CHW)[None])[0].numpy())
    with pytest.raises(BadSample, match="does not hold this picture"):
        cache.lookup(digest[:30] + b"\0\1", 1, "x")


def test_streams_with_and_without_a_cache_share_masks(cache_path: Path) -> None:
    """Turning the cache on changes crops and codes alone."""
    texts = TextInput(tokenizer(), 8)
    cached = PairCollate(ImageInput(VIEWS, 4, CodeCache(cache_path, VIEWS, HASH)), texts)
    online = PairCollate(ImageInput(VIEWS, 4), texts)
    batches = []
    for collate in (cached, online):
        mixture = StreamMixture([Stream("pairs", DrawnSource(30), collate, 10, 5)], seed=0)
        batches.append(next(mixture.loader(0, 0, 1, 1))[0])
    assert torch.equal(batches[0].targets["image_mask"], batches[1].targets["image_mask"])
    assert torch.equal(batches[0].texts[0].ids_BT, batches[1].texts[0].ids_BT)
    assert "codes" not in batches[1].targets
    assert len(batches[1].images) == 2
