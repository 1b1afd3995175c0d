"""The batches of a run: the same on any number of workers and processes, resumed anywhere, never shrunk."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import DrawnSource, tokenizer
from torch import Tensor

from trivium.data import shards
from trivium.data.collate import ImageCollate, ImageInput, PairCollate, TextCollate, TextInput
from trivium.data.loader import StreamReader, evaluation_batches
from trivium.data.mixture import StreamMixture
from trivium.data.order import Draws, Order, pair_rows
from trivium.data.views import Views
from trivium.errors import BadSample, TriviumError, lost_process
from trivium.train.protocol import Batch, Sample, Stream

# torch warns where workers outnumber the cores; the point here is that their number decides nothing
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

TOKENIZER = tokenizer()
VIEWS = Views(size=16, crop_scale=(0.5, 1.0), flip=0.5)
IMAGES = ImageInput(VIEWS, patch=4, cache_bytes=30_000)
TEXTS = TextInput(TOKENIZER, 16)
PAIRS = PairCollate(IMAGES, TEXTS, false_pairs=0.4)


def mixture(workers: int = 0, source: DrawnSource | None = None, collate: PairCollate = PAIRS) -> StreamMixture:
    source = source or DrawnSource(50)
    streams = [
        Stream("pairs", source, collate, 16, 4, 0.70),
        Stream("images", replace(source, num_rows=30), ImageCollate(IMAGES), 8, 4, 0.15),
        Stream("text", source, TextCollate(TEXTS), 12, 3, 0.15),
    ]
    return StreamMixture(streams, seed=11, workers=workers, window=2)


def content(batch: Batch) -> list[Tensor | str | int]:
    """Everything a batch holds, as a flat list."""
    parts: list[Tensor | str | int] = [batch.stream, batch.number, *batch.bad, batch.rows_B, batch.places_B]
    for image in batch.images:
        parts += [image.pixels_BCHW, image.same_B]
    for text in batch.texts:
        parts += [text.ids_BT, text.mask_BT, text.same_B]
    return parts + [batch.targets[name] for name in sorted(batch.targets)]


def equal(first: Sequence[list[Batch]], second: Sequence[list[Batch]]) -> bool:
    def same(a: Tensor | str | int, b: Tensor | str | int) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b

    flat = [[part for step in steps for batch in step for part in content(batch)] for steps in (first, second)]
    return len(flat[0]) == len(flat[1]) and all(same(a, b) for a, b in zip(*flat, strict=True))


@pytest.fixture(scope="module")
def plain() -> list[list[Batch]]:
    """The first 24 steps, read by this process."""
    return list(mixture().loader(0, 0, 1, 24))


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(plain: list[list[Batch]], workers: int) -> None:
    assert {batch.stream for step in plain for batch in step} == {"pairs", "images", "text"}
    assert equal(plain, list(mixture(workers).loader(0, 0, 1, 24)))


def test_two_processes_read_the_halves_of_every_global_batch(plain: list[list[Batch]]) -> None:
    halves = [list(mixture().loader(0, rank, 2, 24)) for rank in range(2)]
    assert equal(plain, [[*first, *second] for first, second in zip(*halves, strict=True)])
    for first, second in zip(*halves, strict=True):
        assert len(first) == len(second) > 0


@pytest.mark.parametrize(("step", "workers"), [(1, 0), (7, 0), (23, 0), (13, 1)])
def test_a_resumed_run_reads_what_is_left(plain: list[list[Batch]], step: int, workers: int) -> None:
    assert equal(plain[step:], list(mixture(workers).loader(step, 0, 1, 24)))


class Numbers:
    """Rows that are their own numbers; every hundredth cannot be read."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows

    def blocks(self) -> list[range]:
        return [range(start, min(start + 100, self.num_rows)) for start in range(0, self.num_rows, 100)]

    def read(self, image_row: int, text_row: int) -> Sample:
        if image_row % 100 == 7:
            raise BadSample("numbers.csv", f"line {image_row}", "no such number")
        return {"text": f"{image_row} {text_row}"}

    def lengths(self) -> list[int]:
        return [len(str(row)) for row in range(self.num_rows)]


class Record:
    """Keeps of each sample what it is and what was drawn for it."""

    false_pairs = 0.2
    sort_by_length = False

    def prepare(self, sample: Sample, draws: Draws) -> tuple[str, float]:
        return sample["text"], draws.generator("mask").random()

    def batch(
        self,
        stream: str,
        prepared: Sequence[tuple[str, float]],
        rows_B: Tensor,
        places_B: Tensor,
        number: int,
        bad: Any,
    ) -> Batch:
        return Batch(stream, rows_B, places_B, targets={"samples": prepared}, number=number, bad=tuple(bad))  # type: ignore[dict-item]


def test_from_one_process_to_two_and_back_ten_thousand_samples_stay_as_they_are() -> None:
    streams = [
        Stream("pairs", Numbers(3000), Record(), 64, 16, 0.70),
        Stream("images", Numbers(900), Record(), 32, 16, 0.15),
        Stream("text", Numbers(500), Record(), 48, 8, 0.15),
    ]

    def steps(first: int, stop: int, world: int) -> list[list[tuple[Any, ...]]]:
        """The micro-batches of each global step, whichever process read them."""
        readers = [StreamMixture(streams, seed=4).loader(first, rank, world, stop) for rank in range(world)]
        return [
            [
                (batch.stream, batch.number, batch.rows_B.tolist(), batch.places_B.tolist(), batch.targets, batch.bad)
                for batches in shares
                for batch in batches
            ]
            for shares in zip(*readers, strict=True)
        ]

    plain = steps(0, 190, 1)
    assert sum(len(batch[2]) for step in plain for batch in step) >= 10_000
    assert sum(len(batch[5]) for step in plain for batch in step) > 50
    assert plain == steps(0, 71, 1) + steps(71, 140, 2) + steps(140, 190, 1)


def test_a_window_of_shards_is_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the loader: the reader goes from one window of blocks to the next, and few shards are open at once."""
    monkeypatch.setattr(shards, "OPEN_SHARDS", 8)
    for number in range(24):
        with tarfile.open(tmp_path / f"{number:02}.tar", "w") as archive:
            for row in range(10):
                member = tarfile.TarInfo(f"{row}.txt")
                member.size = len(text := f"{number} {row}".encode())
                archive.addfile(member, io.BytesIO(text))
    source = shards.TarShards(sorted(tmp_path.glob("*.tar")), "text")
    mixture = StreamMixture([Stream("text", source, Record(), 10, 10)], seed=2, window=4)
    opened: list[int] = []
    plain = shards.open_index
    monkeypatch.setattr(shards, "open_index", lambda path: (opened.append(int(Path(path).stem)), plain(path))[1])
    for step in mixture.loader(0, 0, 1, 24):
        assert len(step) == 1
        tars = [name for name in map(os.path.realpath, Path("/proc/self/fd").iterdir()) if name.endswith(".tar")]
        assert len(tars) <= 8
    assert len(opened) == 24  # in one epoch each shard is opened once
    assert sorted(opened) == list(range(24))


def test_batches_are_whole_and_in_order(plain: list[list[Batch]]) -> None:
    next_place = {"pairs": 0, "images": 0, "text": 0}
    for step in plain:
        assert [batch.number for batch in step] == list(range(4 if step[0].stream != "images" else 2))
        rows = torch.cat([batch.rows_B for batch in step])
        assert rows.tolist() == list(range(len(rows)))
        places = torch.cat([batch.places_B for batch in step])
        start = next_place[step[0].stream]
        assert places.tolist() == list(range(start, start + len(rows)))
        next_place[step[0].stream] += len(rows)


def test_captions_rotate_over_the_global_batch(plain: list[list[Batch]]) -> None:
    """Pictures and captions of a step are the rows that `pair_rows` says, across its micro-batches."""
    order = Order(50, DrawnSource(50).blocks(), 11, "pairs", 2)
    crossed = 0
    for step in plain:
        if step[0].stream != "pairs":
            continue
        places = torch.cat([batch.places_B for batch in step]).numpy()
        image_rows, text_rows = pair_rows(places, order, 0.4, 11, "pairs")
        assert np.array_equal(torch.cat([batch.images[0].same_B for batch in step]).numpy(), image_rows)
        assert np.array_equal(torch.cat([batch.texts[0].same_B for batch in step]).numpy(), text_rows)
        matched = torch.cat([batch.targets["matched"] for batch in step]).numpy()
        assert np.array_equal(matched, image_rows == text_rows)
        crossed += np.any(~np.isin(text_rows[:4], image_rows[:4]))
    assert crossed > 3


def test_sorting_by_length_moves_samples_but_chooses_none(plain: list[list[Batch]]) -> None:
    sorted_run = mixture(collate=replace(PAIRS, sort_by_length=True))
    padding = [0, 0]
    for usual, by_length in zip(plain, sorted_run.loader(0, 0, 1, 24), strict=True):
        if usual[0].stream != "pairs":
            continue
        places = [torch.cat([batch.places_B for batch in step]) for step in (usual, by_length)]
        assert torch.equal(places[0].sort().values, places[1].sort().values)
        rows = torch.cat([batch.rows_B for batch in by_length])
        assert rows.tolist() == list(range(16))
        moved = places[1] - places[0].min()
        pictures = [torch.cat([batch.images[0].pixels_BCHW for batch in step]) for step in (usual, by_length)]
        assert torch.equal(pictures[1], pictures[0][moved])
        for number, step in enumerate((usual, by_length)):
            padding[number] += sum(int((~batch.texts[0].mask_BT).sum()) for batch in step)
    assert padding[1] < padding[0]


def test_sorting_needs_lengths() -> None:
    class Unmeasured(DrawnSource):
        def lengths(self) -> None:
            return None

    with pytest.raises(TriviumError, match="'pairs' cannot be sorted by length"):
        mixture(source=Unmeasured(50), collate=replace(PAIRS, sort_by_length=True))


BAD = {"bad_text": frozenset({3, 40}), "bad_image": frozenset({7, 22})}


def test_unreadable_samples_are_replaced_and_the_rest_stays(plain: list[list[Batch]]) -> None:
    source = DrawnSource(50, **BAD)
    steps = list(mixture(source=source).loader(0, 0, 1, 24))
    order = Order(50, source.blocks(), 11, "pairs", 2)
    num_bad = 0
    for usual, mended in zip(plain, steps, strict=True):
        for before, after in zip(usual, mended, strict=True):
            assert len(after) == len(before)
            if before.stream != "pairs":
                continue
            unreadable = torch.isin(before.images[0].same_B, torch.tensor([7, 22])) | torch.isin(
                before.texts[0].same_B, torch.tensor([3, 40])
            )
            num_bad += int(unreadable.sum())
            assert len(after.bad) >= int(unreadable.sum())
            kept = ~unreadable
            assert torch.equal(after.images[0].pixels_BCHW[kept], before.images[0].pixels_BCHW[kept])
            assert torch.equal(after.targets["image_mask"], before.targets["image_mask"])  # by place, as ever
            for place, row in zip(before.places_B[unreadable], after.images[0].same_B[unreadable], strict=True):
                substitutes = [order.substitute(int(place), attempt) for attempt in range(1, 20)]
                expected = next(row for row in substitutes if row not in {3, 40, 7, 22})
                assert int(row) == expected
    assert num_bad > 10
    sentences = {why for step in steps for batch in step for why in batch.bad}
    assert "drawn.csv (line 40): the text is empty" in sentences
    assert any(why.startswith("drawn.csv (line 7): ") for why in sentences)
    assert equal(steps, list(mixture(3, source=source).loader(0, 0, 1, 24)))


def test_a_source_without_a_readable_sample_ends_the_run() -> None:
    source = DrawnSource(5, bad_image=frozenset(range(5)))
    for workers in (0, 1):
        with pytest.raises(TriviumError, match=r"^stream '\w+': 20 samples in a row could not be read.*drawn.csv"):
            list(mixture(workers, source=source).loader(0, 0, 1, 2))


def test_a_worker_that_dies_is_told() -> None:
    source = DrawnSource(50, kills=frozenset(range(50)))
    with pytest.raises(TriviumError, match="a worker that reads the data ended unexpectedly"):
        list(mixture(1, source=source).loader(0, 0, 1, 10))


def test_only_the_end_of_a_worker_is_told_as_such() -> None:
    assert lost_process(RuntimeError("Caught RuntimeError in DataLoader worker process 0.")) is None
    assert lost_process(RuntimeError("the loss is not finite")) is None


def test_readers_travel_to_workers_that_are_not_forked(plain: list[list[Batch]]) -> None:
    readers = pickle.loads(pickle.dumps(mixture().readers))
    first = plain[0][0]
    assert equal([[first]], [[readers[first.stream].micro_batch(int(first.places_B[0]), 0)]])


def test_reading_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    next(mixture(1).loader(0, 0, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)


def batch_with(size: int, bad: int) -> Batch:
    return Batch(
        "pairs", torch.arange(size), torch.arange(size), bad=tuple(f"a.tar (x{n}.jpg): cut" for n in range(bad))
    )


def test_evaluation_repeats_and_names_what_it_leaves_out() -> None:
    source = DrawnSource(23, bad_image=frozenset({4}), bad_text=frozenset({20}))
    collate = replace(PAIRS, false_pairs=0.5, train=False)
    first, second = ([[batch] for batch in evaluation_batches(source, collate, 8)] for _ in range(2))
    assert equal(first, second)
    batches = [step[0] for step in first]
    places = torch.cat([batch.places_B for batch in batches]).tolist()
    assert set(range(23)) - set(places) >= {4}
    assert len(places) >= 20
    assert [batch.rows_B.tolist() for batch in batches] == [list(range(len(batch))) for batch in batches]
    assert sum(len(batch.bad) for batch in batches) == 23 - len(places)
    matched = torch.cat([batch.targets["matched"] for batch in batches])
    assert 4 < int((~matched).sum()) < 19
    other_batches = list(evaluation_batches(source, replace(collate, false_pairs=0.0), 5))
    masks = torch.cat([batch.targets["image_mask"] for batch in other_batches])
    kept = [place for place in places if place != 20]
    by_place = dict(zip(torch.cat([batch.places_B for batch in other_batches]).tolist(), masks, strict=True))
    ours = dict(zip(places, torch.cat([batch.targets["image_mask"] for batch in batches]), strict=True))
    assert all(torch.equal(ours[place], by_place[place]) for place in kept)  # by row, whatever the batch
    [tenth] = evaluation_batches(DrawnSource(100), replace(collate, false_pairs=0.1), 100)
    assert int((~tenth.targets["matched"]).sum()) == 10  # the recipe's share, not a draw around it
    again = list(evaluation_batches(DrawnSource(10), collate, 8, samples=35))  # three whole passes, no part of one
    masks = [torch.cat([batch.targets["image_mask"] for batch in again[each : each + 2]]) for each in (0, 2, 4)]
    assert len(again) == 6
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])
    limited = list(evaluation_batches(DrawnSource(100), collate, 8, samples=10))
    places = torch.cat([batch.places_B for batch in limited]).tolist()
    assert sorted(places) == list(range(0, 100, 10)) != places  # shuffled, as in training
    half = DrawnSource(8, bad_image=frozenset({0, 3, 5, 6}))
    for size in (1, 2, 8):  # batches that hold nothing else are named elsewhere
        every = list(evaluation_batches(half, replace(PAIRS, train=False), size))
        assert [sum(map(len, every)), sum(len(batch.bad) for batch in every)] == [4, 4]
    with pytest.raises(TriviumError, match="no sample of 'val' could be read"):
        list(evaluation_batches(DrawnSource(2, bad_image=frozenset({0, 1})), collate, 8, stream="val"))


def test_a_reader_covers_an_epoch_exactly_once() -> None:
    reader = StreamReader(Stream("images", DrawnSource(30), ImageCollate(IMAGES), 10, 5), seed=0)
    rows = [
        row
        for place in range(30, 60, 10)
        for number in range(2)
        for row in reader.micro_batch(place, number).images[0].same_B.tolist()
    ]
    assert sorted(rows) == list(range(30))
