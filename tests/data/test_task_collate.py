"""Batches of a task: pairs of texts, what is padded, targets of each kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drawn import drawn_picture
from hypothesis import given
from hypothesis import strategies as st

from trivium.data.embedded import bert_vocabulary
from trivium.data.order import Draws
from trivium.data.random_augment import RandomAugment
from trivium.data.task_collate import TaskCollate, TaskImage, TaskText
from trivium.data.tokenizer import Tokenizer
from trivium.data.transforms import ImageTransform
from trivium.data.views import Views
from trivium.errors import BadSample
from trivium.train.protocol import Batch, Sample

TOKENIZER = Tokenizer.wordpiece(bert_vocabulary())
DRAWS = Draws(0, "task", 0)


def batch_of(collate: TaskCollate, *samples: Sample) -> Batch:
    named = [Sample(**{"name": "a row", "same_image": n, "same_text": n, **s}) for n, s in enumerate(samples)]
    prepared = [collate.prepare(sample, DRAWS) for sample in named]
    rows = torch.arange(len(samples))
    return collate.batch("task", prepared, rows, rows, 0, ())


def test_random_changes_are_made_of_the_random_view_alone() -> None:
    transform, views = ImageTransform(16), Views(16, crop_scale=(0.3, 1.0))
    plain, changing = TaskImage(transform, views), TaskImage(transform, views, changes=RandomAugment())
    sample: Sample = {"image": drawn_picture(3), "name": "a row"}
    for place in range(12):
        draws = Draws(0, "task", place)
        view = plain.prepare(sample, draws, train=True).permute(1, 2, 0).numpy()
        changed = RandomAugment()(draws.generator("crop changes"), view)
        assert np.array_equal(changing.prepare(sample, draws, train=True).permute(1, 2, 0).numpy(), changed)
        assert torch.equal(changing.prepare(sample, draws, train=False), plain.prepare(sample, draws, train=False))


@given(st.integers(0, 12), st.integers(0, 12), st.integers(3, 20))
def test_a_pair_is_cut_at_its_longer_text(first: int, second: int, max_length: int) -> None:
    ids, segments = TOKENIZER.encode_pair("one " * first, "two " * second, max_length)
    kept = [segments[1:-1].count(0) - 1, segments.count(1) - 1]
    room = max_length - 3
    assert len(ids) == len(segments) == sum(kept) + 3 <= max_length
    assert (ids[0], ids[kept[0] + 1], ids[-1]) == (TOKENIZER.cls_id, TOKENIZER.sep_id, TOKENIZER.sep_id)
    if first + second <= room:
        assert kept == [first, second]
    else:
        assert sum(kept) == room
        for own, whole, other in ((kept[0], first, kept[1]), (kept[1], second, kept[0])):
            assert own == whole or own >= other - 1  # what was cut is not the shorter one


def test_a_pair_is_one_sequence_with_segments_where_the_model_has_them() -> None:
    sample = Sample(text="a red mug", second_text="it is red", label=1)
    told = batch_of(TaskCollate(TaskText(TOKENIZER, 32, True), None, 2), sample, Sample(text="red", label=0))
    text = told.texts[0]
    assert TOKENIZER.decode(text.ids_BT[0].tolist()) == "a red mug it is red"
    assert text.segments_BT is not None
    assert text.segments_BT.tolist() == [[0] * 5 + [1] * 4, [0] * 9]
    assert text.mask_BT.sum(1).tolist() == [9, 3]
    plain = batch_of(TaskCollate(TaskText(TOKENIZER, 32, False), None, 2), sample).texts[0]
    assert plain.segments_BT is None
    assert plain.ids_BT[0].tolist() == TOKENIZER.encode(["a red mug it is red"], 32)[0]


def test_a_task_s_texts_of_marks_are_a_bad_sample_where_all_of_them_are_left_out() -> None:
    no_marks = TOKENIZER.for_captions()
    bad: list[tuple[str, str | None]] = [("?!", None), ("...", "?"), ("...", "")]
    for tokenizer, refused in ((TOKENIZER, []), (no_marks, bad)):
        for segments in (False, True):
            text = TaskText(tokenizer, 16, segments)
            for first, second in [*bad, ("red", "..."), ("red", ""), ("!", "red"), ("5", None)]:
                sample = Sample(name="vqa.json (entry 3)", text=first)
                if second is not None:
                    sample["second_text"] = second
                if (first, second) in refused:
                    with pytest.raises(BadSample, match=r"vqa.json \(entry 3\): its text holds nothing that this"):
                        text.prepare(sample)
                else:
                    assert tokenizer.decode(text.prepare(sample)[0])


def test_targets_of_each_kind() -> None:
    text = TaskText(TOKENIZER, 8, True)
    labels = batch_of(TaskCollate(text, None, 3), *(Sample(text="a", label=n) for n in (2, 0)))
    assert labels.targets["label"].tolist() == [2, 0]
    values = batch_of(TaskCollate(text, None, 1, center=2.0, scale=4.0), Sample(text="a", value=4.0))
    assert values.targets["value"].tolist() == [0.5]
    answers = batch_of(
        TaskCollate(text, None, 3), Sample(text="a", answers={2: 0.3, 0: 1.0}), Sample(text="b", answers={})
    )
    torch.testing.assert_close(answers.targets["answers"], torch.tensor([[1.0, 0.0, 0.3], [0.0, 0.0, 0.0]]))
    assert batch_of(TaskCollate(text, None, 3), Sample(text="a")).targets == {}


def test_a_picture_is_whole_in_evaluation_and_a_drawn_view_in_training() -> None:
    from tests.data.drawn import drawn_picture

    transform = ImageTransform(size=32)
    sample = Sample(image=drawn_picture(0), label=0)
    plain = batch_of(TaskCollate(None, TaskImage(transform), 2), sample).images[0].pixels_BCHW
    assert torch.equal(plain[0], transform(drawn_picture(0)))
    views = Views(32, crop_scale=(0.2, 0.3), flip=0.5)
    drawn = TaskCollate(None, TaskImage(transform, views), 2)
    assert not torch.equal(batch_of(drawn, sample).images[0].pixels_BCHW[0], plain[0])
    drawn.train = False
    assert torch.equal(batch_of(drawn, sample).images[0].pixels_BCHW[0], plain[0])


@pytest.mark.parametrize("absent", ["text", "image"])
def test_what_a_sample_lacks_is_said(absent: str) -> None:
    text, image = TaskText(TOKENIZER, 8, True), TaskImage(ImageTransform(size=8))
    collate = TaskCollate(text if absent == "text" else None, image if absent == "image" else None, 2)
    with pytest.raises(BadSample, match=r"row 3.*has no"):
        collate.prepare(Sample(name="row 3", label=0), DRAWS)
    assert np.isfinite(collate.scale)
