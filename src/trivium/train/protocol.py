"""What the engine asks of a family, and nothing else. Imports torch alone (and numpy for hashing).

Legend of the shape suffixes: B rows of a micro-batch, G rows of the global batch, T text tokens, N image tokens,
D width, H height, W width of a picture.

Words: a *stream* is a member of the mixture (pairs, images, text). A *place* is the position of a sample in its
stream: the n-th sample that the stream ever yields has place n, whatever the number of processes. A *row* is the
position of a sample inside the global batch of one step.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

# name -> 0-dim sum over rows, divided later by a count that comes from labels alone; a "stat/..." may have any shape.
Sums = dict[str, Tensor]


# ---------------------------------------------------------------------------------------------- randomness


def hash64(*parts: str | int) -> int:
    """A stable 64-bit number for a tuple of names and numbers; the same on every machine and every run."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: a bijection of 64-bit numbers whose output looks random."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform64(seed: int, index: np.ndarray) -> np.ndarray:
    """One float64 in [0, 1) for each index, a pure function of (seed, index)."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        bits = mix64(mix64(index.astype(np.uint64) * golden + np.uint64(seed)) + golden)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class Key:
    """The position that every random choice of a step is a function of.

    Choices per row of the global batch come from ``uniform``: equal on any layout. Dropout and the like come from
    torch's generator after ``reseed``: equal at a fixed micro-batch.
    """

    seed: int
    stream: str
    step: int

    def uniform(self, name: str, rows: Tensor) -> Tensor:
        """One number in [0, 1) for each row of the GLOBAL batch. rows: int64 (any shape). float64, on CPU."""
        seed = hash64(self.seed, self.stream, self.step, name)
        return torch.from_numpy(uniform64(seed, rows.cpu().numpy()))

    def reseed(self, micro_batch: int) -> None:
        """Seed torch's generators before a forward; micro_batch: its number within the GLOBAL batch."""
        torch.manual_seed(hash64(self.seed, self.stream, self.step, "forward", micro_batch) % 2**63)


# ------------------------------------------------------------------------------------------------- batches


@dataclass
class Images:
    pixels_BCHW: Tensor  # uint8; normalised on the device by the method
    same_B: Tensor  # int64; equal number = the same picture or concept: never each other's negatives
    sizes_B2: Tensor | None = None  # (height, width) before padding; only where pictures are padded


@dataclass
class Texts:
    ids_BT: Tensor  # int64
    mask_BT: Tensor  # bool; True = a real token
    same_B: Tensor  # int64; as in Images. Image and text of one row differ in a false pair
    segments_BT: Tensor | None = None


Part = TypeVar("Part", Images, Texts)


@dataclass
class Batch:
    """One micro-batch. Its tensors stay on CPU; the method moves what it needs."""

    stream: str
    rows_B: Tensor  # int64, the rows of the global batch that stand here; one contiguous slice
    places_B: Tensor  # int64
    images: tuple[Images, ...] = ()
    texts: tuple[Texts, ...] = ()
    # Ragged ones are flat: "box" and "box_class" have an entry for each box, and "box_row" says which row it is of.
    targets: dict[str, Tensor] = field(default_factory=dict)
    number: int = 0  # of this micro-batch within the global batch; what Key.reseed takes
    bad: tuple[str, ...] = ()  # one sentence for each sample that was replaced

    def __len__(self) -> int:
        return len(self.rows_B)

    def pin_memory(self) -> Batch:
        """The same with its pictures where a GPU copies them from while it computes; called by torch's DataLoader."""
        return replace(
            self, images=tuple(replace(each, pixels_BCHW=each.pixels_BCHW.pin_memory()) for each in self.images)
        )

    def part(self, first: int, stop: int, number: int) -> Batch:
        """Some of its rows as a micro-batch of their own, padded as the whole: pads may be seen."""
        rows = slice(first, stop)
        targets = {}
        for name, value in self.targets.items():
            flat = f"{name.partition('_')[0]}_row"
            if flat not in self.targets:
                targets[name] = value[rows]
                continue
            row_M = self.targets[flat]
            of_part_M = (row_M >= first) & (row_M < stop)
            targets[name] = value[of_part_M] - first if name == flat else value[of_part_M]
        return replace(
            self,
            rows_B=self.rows_B[rows],
            places_B=self.places_B[rows],
            images=tuple(_rows_of(images, rows) for images in self.images),
            texts=tuple(_rows_of(texts, rows) for texts in self.texts),
            targets=targets,
            number=number,
        )


def _rows_of(part: Part, rows: slice) -> Part:
    changed = {name: value[rows] for name, value in vars(part).items() if value is not None}
    return replace(part, **changed)


class Sample(TypedDict, total=False):
    """What a source yields: undecoded, untokenized. Absent keys are absent, not None."""

    image: bytes  # an encoded picture
    second_image: bytes  # of a task that reads two pictures
    text: str
    texts: list[str]  # several captions of one picture: one is chosen by place
    same_image: int  # equal number = same picture or concept
    same_text: int
    label: int
    second_text: str  # of a task that reads two texts
    value: float  # what a regression is to give
    answers: dict[int, float]  # class -> how far it is right, from 0 to 1
    written: dict[str, float]  # answers as people wrote them -> the weight of each
    size: tuple[int, int]  # (height, width) that boxes refer to
    boxes: np.ndarray  # float32 [n, 4], (left, top, right, bottom) in pixels
    classes: np.ndarray  # int64 [n], of each box
    attributes: np.ndarray  # int64 [n, places], of each box; -1 where there is none
    name: str  # how to name this sample in a message: file, line, member


class Blocks(Sequence[range]):
    """Ranges of rows, one after the other from row 0, held as their bounds: what is asked of all of them at once is
    asked of one array, and a million of them are no million objects."""

    def __init__(self, bounds: np.ndarray) -> None:
        """bounds: int64 [n + 1], never falling: where each range begins, and after the last the number of rows."""
        self.bounds = bounds

    @classmethod
    def of(cls, blocks: Sequence[range]) -> Blocks:
        """Those of any source."""
        if isinstance(blocks, Blocks):
            return blocks
        bounds = np.array([0, *(block.stop for block in blocks)], dtype=np.int64)
        assert bounds[:-1].tolist() == [block.start for block in blocks], "blocks must cover every row once, in order"
        return cls(bounds)

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each: int64 [n]."""
        return np.diff(self.bounds)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        return range(int(self.bounds[number]), int(self.bounds[number + 1]))


class Source(Protocol):
    """Somewhere that samples come from, addressed by row. Cheap to pickle: workers open their own files."""

    def __len__(self) -> int: ...

    def blocks(self) -> Sequence[range]:
        """Ranges of rows that are cheap to read together; in order and covering all rows exactly once. A list does; a
        source of many of them gives `Blocks`."""
        ...

    def read(self, image_row: int, text_row: int) -> Sample:
        """The picture of one row with the text of another (they differ only in a false pair). Raises BadSample."""
        ...

    def lengths(self) -> Sequence[int] | None:
        """What rows of a batch may be sorted by, so that those that are padded together are alike: the length of each
        text in characters, of pictures with boxes their shape. None where it is not known without reading."""
        ...


@dataclass
class Stream:
    """One member of the mixture. The batch sizes belong to the stream, the number of processes does not."""

    name: str
    source: Source
    collate: Any  # see data/loader.py: turns decoded samples of one micro-batch into a Batch
    batch: int  # rows of the global batch
    micro_batch: int  # rows of one forward; divides batch
    ratio: float = 1.0  # share of the steps
    window: int | None = None  # blocks of the source that are mixed with each other; None: as the mixture has it


class Mixture(Protocol):
    """Which stream a step draws from, where in it the step begins, and the batches themselves."""

    def stream_at(self, step: int) -> Stream: ...

    def place_at(self, step: int) -> int:
        """Place of the first row of this step's global batch within its stream."""
        ...

    def names_at(self, step: int) -> list[str]:
        """How messages name each sample of this step's global batch: by file and line, row or member."""
        ...

    def loader(self, step: int, rank: int, world: int, stop: int, pinned: bool = False) -> Iterator[list[Batch]]:
        """This process's micro-batches of each step in [step, stop), in order; `pinned` for a run on a GPU."""
        ...


# ------------------------------------------------------------------------------------------------- method


@dataclass
class Rows:
    """What couples the samples of a batch, and the marks that `couple` needs. Everything is gathered.

    rows: name -> [B, D], gathered with gradient. marks: name -> [B, ...], gathered without.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    marks: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Watched:
    """A figure that says how training fares, and the range in which nothing is amiss."""

    value: Tensor  # 0-dim
    low: float
    high: float
    advice: str  # what it means outside, and what to do


def deviation(mean_D: Tensor) -> Tensor:
    """Of rows at unit length, from their mean: how far they lie from it (root of the mean square). 0: all are one."""
    return (1 - mean_D.square().sum()).clamp(min=0).sqrt()


class Method(nn.Module, ABC):
    """Model + objectives = what one training step does with a batch.

    The student is ``.model``; teacher, queue, centre and a frozen image tokenizer are other modules and buffers.
    A method never calls a collective and never divides by a count of its own batch: it returns sums, and
    ``train/step.py`` divides them by counts of the global batch.
    """

    model: nn.Module
    weights: dict[str, float]  # of each loss; 0 = never computed

    @abstractmethod
    def counts(self, batch: Batch) -> Sums:
        """What each loss is divided by, from labels alone. 0-dim tensors."""

    def divisors(self, counts: Sums) -> Sums:
        """From counts summed over the global batch to what each loss is divided by. Default: the counts."""
        return counts

    def embed(self, batch: Batch) -> tuple[Rows, Any]:
        """What couples samples, and states that `separate` may use again. Default: nothing couples."""
        return Rows(), None

    def couple(self, mine: Rows, everyone: Rows) -> Sums:
        """Losses of my rows against all rows (contrastive, ITC, KoLeo)."""
        return {}

    @abstractmethod
    def separate(self, batch: Batch, rows: Rows, states: Any, counts: Sums, key: Key) -> Sums:
        """Every other loss. `counts` are the global ones. A name "stat/..." is no loss: it is summed over the
        global batch and handed to `after_step`, and where it has no dimension to the log."""

    def after_step(self, step: int, everyone: Rows, stats: Sums) -> None:
        """EMA, enqueue, centre, clamp of the logit scale: once per accepted step."""

    def exported(self) -> nn.Module:
        """What a model folder holds and evaluation sees. Default: the student."""
        return self.model

    def schedule(self, step: int) -> None:
        """Set temperatures, momentum and the like for this step: pure functions of the step."""

    # For the monitors alone (train/monitors.py): training is the same without.

    def clamped(self) -> dict[str, tuple[Tensor, float, float]]:
        """Learned numbers that are held in a range, such as the logit scale: name -> (value [1], lowest, highest)."""
        return {}

    def watched(self) -> dict[str, Watched]:
        """Figures of the last accepted step that tell a training gone wrong, such as a collapse, by name."""
        return {}

    def chance(self, counts: Mapping[str, float]) -> dict[str, float]:
        """What losses are for a model that knows only how often each label occurs, where `counts` tell it.

        counts: what `counts` returned, summed over the global batch; a mean over several steps.
        """
        return {}
