"""What a batch holds: unmasked ids, masks and targets, both views of one crop, repeatable in evaluation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn import DrawnSource, caption, drawn_picture, tokenizer

from trivium.data import collate as collate_module
from trivium.data.collate import ImageCollate, ImageInput, PairCollate, TextCollate, TextInput
from trivium.data.embedded import bert_vocabulary
from trivium.data.loader import read
from trivium.data.masking import mask_tokens
from trivium.data.order import Draws
from trivium.data.random_augment import RandomAugment
from trivium.data.tokenizer import Tokenizer
from trivium.data.transforms import color_jitter, crop_and_resize
from trivium.data.views import View, Views
from trivium.errors import BadSample, TriviumError
from trivium.train.protocol import Batch, Sample

TOKENIZER = tokenizer()
VIEWS = Views(size=16, crop_scale=(0.3, 1.0), flip=0.5)


def pair_collate(views: Views = VIEWS, cache_bytes: int = 0, train: bool = True) -> PairCollate:
    return PairCollate(ImageInput(views, patch=4, cache_bytes=cache_bytes), TextInput(TOKENIZER, 32), train=train)


def batch_of(collate: PairCollate, rows: list[int], first_place: int = 0, concepts: int | None = None) -> Batch:
    source = DrawnSource(100, concepts=concepts)
    places = list(range(first_place, first_place + len(rows)))
    prepared = [
        read(source, collate, row, row, Draws(0, "pairs", place)) for row, place in zip(rows, places, strict=True)
    ]
    return collate.batch("pairs", prepared, torch.arange(len(rows)), torch.tensor(places), 3, ["one"])


def same(first: Batch, second: Batch) -> bool:
    tensors = [
        [*(image.pixels_BCHW for image in batch.images), *(text.ids_BT for text in batch.texts)]
        + [batch.targets[name] for name in sorted(batch.targets)]
        for batch in (first, second)
    ]
    return all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


def test_both_views_of_a_picture_change_colour_alike() -> None:
    views = replace(VIEWS, codebook_size=8)
    plain, changed = (
        batch_of(PairCollate(ImageInput(views, patch=4, color_jitter=strength), TextInput(TOKENIZER, 32)), [4, 8])
        for strength in (0.0, 0.4)
    )
    for before, after in zip(plain.images, changed.images, strict=True):
        for place, (left, right) in enumerate(zip(before.pixels_BCHW, after.pixels_BCHW, strict=True)):
            rng = Draws(0, "pairs", place).generator("color")
            expected_HWC = color_jitter(rng, left.permute(1, 2, 0).numpy(), 0.4).astype(int)
            assert np.abs(expected_HWC - right.permute(1, 2, 0).numpy()).max() <= 1
            assert not torch.equal(left, right)


def test_a_pair_batch() -> None:
    collate = pair_collate(train=False)
    batch = batch_of(collate, [4, 8, 15, 16])
    [images], [texts] = batch.images, batch.texts
    assert images.pixels_BCHW.dtype == torch.uint8
    assert images.pixels_BCHW.shape == (4, 3, 16, 16)
    whole = VIEWS.decode(drawn_picture(8))
    assert np.array_equal(images.pixels_BCHW[1].numpy(), crop_and_resize(whole, 16, filter="bicubic"))
    found = [ids[mask].tolist() for ids, mask in zip(texts.ids_BT, texts.mask_BT, strict=True)]
    for row, ids in zip((4, 8, 15, 16), found, strict=True):
        assert ids in TOKENIZER.encode([caption(row), caption(row) + " again"], 32)  # one of the picture's captions
    assert texts.ids_BT.shape[1] == max(map(len, found))  # the batch's own length, not max_length
    masked_ids, selected = batch.targets["masked_ids"], batch.targets["selected"]
    assert torch.equal(masked_ids[~selected], texts.ids_BT[~selected])
    assert not (selected & ~texts.mask_BT).any()
    assert batch.targets["image_mask"].shape == (4, 16)
    assert batch.targets["image_mask"].dtype == torch.bool
    assert 0 < batch.targets["image_mask"].sum() <= 4 * 6
    assert batch.targets["matched"].all()
    assert (batch.number, batch.bad, batch.stream) == (3, ("one",), "pairs")
    assert batch.places_B.tolist() == [0, 1, 2, 3]


def test_choices_come_from_the_place_in_training_and_from_nothing_else() -> None:
    collate = pair_collate()
    first = batch_of(collate, [1, 2, 3, 4, 5, 6])
    assert same(first, batch_of(pair_collate(), [1, 2, 3, 4, 5, 6]))
    elsewhere = batch_of(collate, [1, 2, 3, 4, 5, 6], first_place=100)
    assert not torch.equal(first.images[0].pixels_BCHW, elsewhere.images[0].pixels_BCHW)
    assert not torch.equal(first.targets["image_mask"], elsewhere.targets["image_mask"])
    other_order = batch_of(collate, [6])  # alone in its batch, at the place where row 1 stood
    assert torch.equal(other_order.targets["image_mask"][0], first.targets["image_mask"][0])
    captions = [read(DrawnSource(9), collate, 5, 5, Draws(0, "pairs", place))[1].text for place in range(40)]
    assert len(set(captions)) == 2  # both captions of the picture are used


def test_evaluation_neither_crops_nor_flips() -> None:
    collate = pair_collate(train=False)
    first, elsewhere = batch_of(collate, [1, 2, 3]), batch_of(collate, [1, 2, 3], first_place=50)
    assert torch.equal(first.images[0].pixels_BCHW, elsewhere.images[0].pixels_BCHW)


def test_random_changes_come_after_the_crop_in_training_alone_and_from_the_place() -> None:
    plain = ImageInput(VIEWS, patch=4, masked=False)
    changing = replace(plain, changes=RandomAugment())

    def pictures(images: ImageInput, train: bool, first_place: int = 0) -> torch.Tensor:
        collate = PairCollate(images, TextInput(TOKENIZER, 32), train=train)
        return batch_of(collate, list(range(12)), first_place).images[0].pixels_BCHW

    before, after = pictures(plain, train=True), pictures(changing, train=True)
    assert torch.equal(after, pictures(changing, train=True))
    assert torch.equal(pictures(changing, train=False), pictures(plain, train=False))
    for place in range(12):
        view = before[place].permute(1, 2, 0).numpy()
        changed = RandomAugment()(Draws(0, "pairs", place).generator("changes"), view)
        assert np.array_equal(after[place].permute(1, 2, 0).numpy(), changed)
    assert not torch.equal(before, after)


def test_the_decoded_cache_changes_nothing() -> None:
    rows = [1, 2, 3, 1, 2, 3, 4, 4]
    plain = pair_collate()
    room_for_two = pair_collate(cache_bytes=2 * 20 * 24 * 3 + 10)
    ample = pair_collate(cache_bytes=10**6)
    for first_place in (0, 8, 16):
        expected = batch_of(plain, rows, first_place)
        assert same(expected, batch_of(room_for_two, rows, first_place))
        assert same(expected, batch_of(ample, rows, first_place))
    assert len(room_for_two.images._decoded) == 2
    assert len(ample.images._decoded) == 4


def test_both_views_show_the_same_crop() -> None:
    """A picture whose left half is black and right half white: in a flipped crop both views split at the same share."""
    views = replace(VIEWS, size=32, codebook_size=16)
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    picture[:, 32:] = 255
    seen = set()
    for place in range(30):
        view = views.draw(Draws(0, "pairs", place).generator("crop"), 64, 64)
        model, codebook = views.for_model(picture, view), views.for_codebook(picture, view)
        assert model.shape == (3, 32, 32)
        assert codebook.shape == (3, 16, 16)
        halved = model.reshape(3, 16, 2, 16, 2).mean(axis=(2, 4))
        assert np.abs(halved - codebook).mean() < 12
        seen.add((view.flip, bool(model[0, 0, 0] > 128)))
    assert {flip for flip, _ in seen} == {False, True}
    batch = batch_of(pair_collate(replace(VIEWS, codebook_size=8)), [1, 2])
    assert [image.pixels_BCHW.shape for image in batch.images] == [(2, 3, 16, 16), (2, 3, 8, 8)]


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    views = Views(size=16, filter="lanczos", crop_scale=(1.0, 1.0))
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert views.draw(Draws(0, "pairs", 0).generator("crop"), 16, 16) == View(None, False)
    assert np.array_equal(views.for_model(picture, View()), picture.transpose(2, 0, 1))
    assert np.array_equal(views.for_model(picture, View(flip=True)), picture[:, ::-1].transpose(2, 0, 1))


def test_a_rotated_caption_of_the_same_concept_still_matches() -> None:
    collate = pair_collate()
    source = DrawnSource(100, concepts=10)
    prepared = [read(source, collate, image, text, Draws(0, "pairs", 0)) for image, text in [(1, 11), (2, 13), (5, 5)]]
    batch = collate.batch("pairs", prepared, torch.arange(3), torch.arange(3), 0, [])
    assert batch.targets["matched"].tolist() == [True, False, True]
    assert batch.images[0].same_B.tolist() == [1, 2, 5]
    assert batch.texts[0].same_B.tolist() == [1, 3, 5]


def test_texts_that_are_kept_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [1, 2, 3, 1, 2, 3, 4, 4]
    for room, least, most in ((0, 0, 0), (60, 1, 3), (10**6, 4, 8)):
        monkeypatch.setattr(collate_module, "KEPT_CHARACTERS", room)
        kept = pair_collate()
        for first_place in (0, 8, 16):
            assert same(batch_of(pair_collate(), rows, first_place), batch_of(kept, rows, first_place))
        assert least <= len(kept.texts._tokenized) <= most


def test_streams_of_one_kind() -> None:
    source = DrawnSource(20)
    images = ImageCollate(ImageInput(VIEWS, patch=4))
    texts = TextCollate(TextInput(TOKENIZER, 8))
    for collate, names in ((images, {"image_mask"}), (texts, {"masked_ids", "selected"})):
        prepared = [read(source, collate, row, row, Draws(0, "one", row)) for row in range(5)]
        batch = collate.batch("one", prepared, torch.arange(5), torch.arange(5), 0, [])
        assert set(batch.targets) == names
        assert len(batch.images) + len(batch.texts) == 1
        assert [part.same_B.tolist() for part in (*batch.images, *batch.texts)] == [[0, 1, 2, 3, 4]]
    assert batch.texts[0].ids_BT.shape[1] == 8  # cut


def test_whole_words_option() -> None:
    pieces = Tokenizer.train((caption(row) for row in range(300)), 90)
    collate = TextCollate(TextInput(pieces, 40, probability=0.5, whole_words=True))
    prepared = [read(DrawnSource(200), collate, 150, 150, Draws(0, "text", place)) for place in range(30)]
    batch = collate.batch("text", prepared, torch.arange(30), torch.arange(30), 0, [])
    for ids, selected in zip(batch.texts[0].ids_BT.numpy(), batch.targets["selected"].numpy(), strict=True):
        later = np.flatnonzero(pieces.continues[ids])
        assert len(later)
        assert np.array_equal(selected[later], selected[later - 1])


@pytest.mark.parametrize("whole_words", [False, True])
def test_texts_of_a_batch_are_tokenized_and_masked_as_if_each_stood_alone(whole_words: bool) -> None:
    pieces = Tokenizer.train((caption(row) for row in range(300)), 90)
    collate = TextCollate(TextInput(pieces, 64, probability=0.3, whole_words=whole_words))
    draws = [Draws(7, "text", place) for place in range(25)]
    prepared = [read(DrawnSource(200), collate, 7 * row, 7 * row, each) for row, each in enumerate(draws)]
    batch = collate.batch("text", prepared, torch.arange(25), torch.arange(25), 0, [])
    ids_BT, mask_BT = batch.texts[0].ids_BT, batch.texts[0].mask_BT
    assert len(set(mask_BT.sum(1).tolist())) > 1
    for row, (text, each) in enumerate(zip(prepared, draws, strict=True)):
        [ids] = pieces.encode([text.text], 64)
        masked, selected = mask_tokens(
            each.generator("tokens").random((3, len(ids))), np.array(ids), pieces.special_ids, pieces.vocab_size,
            pieces.mask_id, 0.3, pieces.continues if whole_words else None,
        )  # fmt: skip
        real = mask_BT[row]
        assert ids_BT[row][real].tolist() == ids
        assert batch.targets["masked_ids"][row][real].tolist() == masked.tolist()
        assert batch.targets["selected"][row][real].tolist() == selected.tolist()
        assert not batch.targets["selected"][row][~real].any()
        assert (ids_BT[row][~real] == pieces.pad_id).all()
        assert (batch.targets["masked_ids"][row][~real] == pieces.pad_id).all()


def test_a_family_that_predicts_nothing_gets_the_same_pairs_without_masks() -> None:
    """And needs no mask token: CLIP's own vocabulary has none."""
    masked = pair_collate()
    without = PairCollate(ImageInput(VIEWS, patch=4, masked=False), TextInput(TOKENIZER, 32, probability=None))
    batch, plain = batch_of(without, [4, 8, 15]), batch_of(masked, [4, 8, 15])
    assert set(batch.targets) == {"matched"}
    assert torch.equal(batch.images[0].pixels_BCHW, plain.images[0].pixels_BCHW)
    assert torch.equal(batch.texts[0].ids_BT, plain.texts[0].ids_BT)
    assert torch.equal(batch.texts[0].mask_BT, plain.texts[0].mask_BT)


def test_mistakes_are_told() -> None:
    with pytest.raises(TriviumError, match="16 pixels cannot be cut into patches of 5"):
        ImageInput(VIEWS, patch=5)
    sample = Sample(name="a.csv (line 3)", same_image=0, same_text=0)
    draws = Draws(0, "pairs", 0)
    with pytest.raises(BadSample, match=r"a\.csv \(line 3\): has no picture"):
        ImageCollate(ImageInput(VIEWS, patch=4)).prepare(sample, draws)
    with pytest.raises(BadSample, match=r"a\.csv \(line 3\): has no text"):
        TextCollate(TextInput(TOKENIZER, 8)).prepare(sample, draws)


@pytest.mark.parametrize("text", ["...", "?! -", "\u0301"])
def test_a_text_of_marks_is_a_bad_sample_where_the_vocabulary_leaves_out_marks(text: str) -> None:
    """It would be a bare [CLS]. Where marks are read it is a text like others."""
    sample = Sample(name="a.csv (line 3)", same_image=0, same_text=0, text=text)
    marks, no_marks = Tokenizer.wordpiece(bert_vocabulary()), Tokenizer.wordpiece(bert_vocabulary()).for_captions()
    if text != "\u0301":  # BERT's own steps leave out accents that stand alone
        assert marks.decode(TextCollate(TextInput(marks, 8)).prepare(sample, Draws(0, "text", 0)).ids)
    with pytest.raises(BadSample, match=r"a\.csv \(line 3\): its text holds nothing that this model reads, only marks"):
        TextCollate(TextInput(no_marks, 8)).prepare(sample, Draws(0, "text", 0))
