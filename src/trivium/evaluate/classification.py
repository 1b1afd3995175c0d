"""One vision data set, measured as the papers do: linear probe, nearest neighbours, zero-shot; and what to distrust.

The probe follows CLIP (Radford et al. 2021, appendix A.3), as FLAVA does: features before any projection, as they are;
C by the accuracy on the validation split, or on a fifth of the training split where there is none; then a fit on both,
scored once on the test split. Accuracy is FLAVA's figure for every data set; the mean of the accuracies of the classes,
CLIP's for some, stands beside it.

N samples, K classes, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trivium.bundle import Bundle
from trivium.bundle.untrained import no_cosine
from trivium.data import duplicates
from trivium.evaluate import features as encoding
from trivium.evaluate import knn, linear_probe, zero_shot
from trivium.evaluate.datasets import never_answered
from trivium.evaluate.datasets.copies import CLASS_NAMES
from trivium.evaluate.datasets.pictures import DataSet, Split, held_out
from trivium.evaluate.feature_store import Encoder, Features, features
from trivium.evaluate.results import Result, Results, bootstrap, mean_of

READING = "pooled"
TOP = 5  # classes in front, of which one may be the right one: reported of zero-shot where there are more


@dataclass
class Measured:
    """What a task gave."""

    results: Results = field(default_factory=dict)  # without the task's name
    notes: list[str] = field(default_factory=list)
    is_final: bool = True  # False: a file could not be read that may be another time, so nothing of it is kept


def classification(
    data: DataSet,
    encoder: Encoder,
    store: Path,
    bundle: Bundle | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Measured:
    """Measure a data set.

    Args:
        store: folder for features.
        bundle: whose texts name the classes; None: no zero-shot.

    Raises:
        TriviumError: no picture of a split can be read.
    """
    found = Measured(notes=[f"{data.splits}: {_sizes(data)}", *data.notes])
    train = Part.of("training", data.train, encoder, store, say, (READING,))
    test = Part.of("test", data.test, encoder, store, say)
    parts = [train, test]
    if data.validation is None:
        held_N = held_out(train.labels_N)
        fitted, checked, whole = train[~held_N], train[held_N], train
    else:
        validation = Part.of("validation", data.validation, encoder, store, say, (READING,))
        parts.append(validation)
        fitted, checked, whole = train, validation, train + validation
    for part in parts:
        found.notes += part.complaints
        found.is_final &= part.features.is_final
    lost = np.setdiff1d(data.train.labels_N, whole.labels_N).tolist()
    if lost:
        found.notes.append(never_answered([data.classes[label] for label in lost], " can be read"))
    found.notes += leakage(whole, test)
    device = torch.device("cpu") if bundle is None else bundle.device
    say("linear probe")
    predicted_N, note = _probe(fitted, checked, whole, test, device)
    found.notes.append(note)
    found.results |= accuracies("linear_probe", predicted_N, test)
    say("nearest neighbours")
    gallery_labels_N = torch.from_numpy(whole.labels_N).to(device)
    predicted_N = knn.predict(test.rows.to(device), whole.rows.to(device), gallery_labels_N).cpu().numpy()
    found.results |= accuracies("knn", predicted_N, test)
    if bundle is not None and "projected" in test.features.readings:
        if data.prompts:
            say("zero-shot")
            templates = data.templates or zero_shot.OF_PHOTOGRAPHS
            classes_KD = zero_shot.class_vectors(
                [(name,) for name in data.prompts], lambda texts: encoding.of_texts(bundle, texts), templates
            )
            shown_ND, labels_N = test.features.readings["projected"], torch.from_numpy(test.labels_N)
            found.results |= accuracies("zero_shot", zero_shot.predict(shown_ND, classes_KD).numpy(), test)
            if len(classes_KD) > TOP:
                right_N = zero_shot.among_nearest(shown_ND, classes_KD, labels_N, TOP)
                found.results[f"zero_shot.top{TOP}_accuracy"] = mean_of(right_N.numpy(), test.units)
            of = "of the copy or the user's" if data.templates else "short ones of our own, not CLIP's"
            found.notes.append(f"zero-shot: {len(templates)} template{'s' if len(templates) > 1 else ''}, {of}")
        else:
            found.notes.append(
                f"no zero-shot: the files have no words for the classes, which they call {', '.join(data.classes[:2])}"
                f" and so on: put {CLASS_NAMES}, a line a class in that order, into the folder of the data"
            )
    elif bundle is not None and (why := no_cosine(bundle.untrained)) is not None:
        found.notes.append(f"no zero-shot: {why}")
    return found


class Part:
    """A split with its features, as far as its pictures can be read."""

    def __init__(self, name: str, labels_N: np.ndarray, units: list[str], found: Features) -> None:
        self.name, self.labels_N, self.units, self.features = name, labels_N, units, found

    @classmethod
    def of(
        cls, name: str, split: Split, encoder: Encoder, store: Path, say: Callable[[str], None],
        wanted: Collection[str] | None = None,
    ) -> Part:  # fmt: skip
        """wanted: as `features` takes it."""
        say(f"the {name} split")
        found = features(encoder, split.pictures, store, say, wanted)
        return cls(
            name, split.labels_N[found.rows_N], [split.pictures.name(row) for row in found.rows_N.tolist()], found
        )

    @property
    def rows(self) -> Tensor:
        return self.features.readings[READING]

    @property
    def complaints(self) -> list[str]:
        """What of the split could not be read."""
        bad = self.features.bad
        if not bad:
            return []
        of = f"{len(bad):,} of {len(bad) + len(self):,} {self.name} pictures"
        return [f"{of} cannot be read and are left out; the first: {bad[0]}"]

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, which_N: np.ndarray) -> Part:
        rows = np.flatnonzero(which_N)
        index = torch.from_numpy(rows)
        old = self.features
        return Part(
            self.name, self.labels_N[rows], [self.units[row] for row in rows],
            Features(
                {name: values[index] for name, values in old.readings.items()}, old.rows_N[rows],
                [old.digests[row] for row in rows], old.hashes_N[rows], old.colours_NC[rows], [],
            ),
        )  # fmt: skip

    def __add__(self, other: Part) -> Part:
        one, two = self.features, other.features
        return Part(
            self.name, np.concatenate([self.labels_N, other.labels_N]), [*self.units, *other.units],
            Features(
                {name: torch.cat([values, two.readings[name]]) for name, values in one.readings.items()},
                np.concatenate([one.rows_N, two.rows_N]), [*one.digests, *two.digests],
                np.concatenate([one.hashes_N, two.hashes_N]), np.concatenate([one.colours_NC, two.colours_NC]), [],
            ),
        )  # fmt: skip


def _probe(fitted: Part, checked: Part, whole: Part, test: Part, device: torch.device) -> tuple[np.ndarray, str]:
    """The answers on the test split, and a sentence on the fit."""
    chosen: linear_probe.Probe | None = None
    c, of = 1.0, "since no class has enough pictures to choose it by"
    if len(checked):
        solver = linear_probe.Solver(fitted.rows, torch.from_numpy(fitted.labels_N), device)
        chosen = linear_probe.search(solver, checked.rows, torch.from_numpy(checked.labels_N))
        right = float((chosen.predict(checked.rows).cpu().numpy() == checked.labels_N).mean())
        c, of = chosen.c, f"chosen by {100 * right:.1f} % on {len(checked):,} pictures of the {_where(fitted, checked)}"
    solver = linear_probe.Solver(whole.rows, torch.from_numpy(whole.labels_N), device)
    probe = solver.solve(c, chosen)
    ended = f"{probe.iterations} iterations" if probe.converged else f"stopped after {probe.iterations} iterations"
    note = f"linear probe: C = {c:.3g}, {of}; fitted on {len(whole):,} pictures, {ended}"
    return probe.predict(test.rows).cpu().numpy(), note


def _where(fitted: Part, checked: Part) -> str:
    return f"{checked.name} split" if checked.name != fitted.name else "training split that were held out"


def accuracies(protocol: str, predicted_N: np.ndarray, test: Part) -> Results:
    """`<protocol>.accuracy`, and `<protocol>.mean_per_class`: the mean of the classes' own accuracies."""
    right_N = predicted_N == test.labels_N
    _, place_N = np.unique(test.labels_N, return_inverse=True)

    def mean_per_class(drawn: np.ndarray) -> float:
        counts_K = np.bincount(place_N[drawn])
        right_K = np.bincount(place_N[drawn], weights=right_N[drawn])
        return float((right_K[counts_K > 0] / counts_K[counts_K > 0]).mean())

    low, high = bootstrap(mean_per_class, len(test))
    return {
        f"{protocol}.accuracy": mean_of(right_N, test.units),
        f"{protocol}.mean_per_class": Result(mean_per_class(np.arange(len(test))), low, high, len(test)),
    }


def leakage(train: Part, test: Part) -> list[str]:
    """Sentences on test pictures that training saw too, equal or nearly so. Nothing is left out for it."""
    first = dict(zip(reversed(train.features.digests), reversed(train.units), strict=True))
    equal = {row: first[digest] for row, digest in enumerate(test.features.digests) if digest in first}
    pairs = duplicates.near_across(
        train.features.hashes_N, train.features.colours_NC, test.features.hashes_N, test.features.colours_NC
    )
    near = {int(other): train.units[int(one)] for one, other in pairs if int(other) not in equal}
    bits = f"at most {duplicates.DISTANCE} of {duplicates.BITS} bits of the hash"
    how = f"{bits} and {duplicates.COLOURS:g} of 255 in colour"
    return [
        f"leakage: {len(found):,} of {len(test):,} test pictures {what} in training; they are counted all the same; the"
        f" first: {test.units[row]} and {found[row]}"
        for found, what in ((equal, "stand, equal to the pixel,"), (near, f"have a near copy ({how})"))
        for row in list(found)[:1]
    ]


def _sizes(data: DataSet) -> str:
    return ", ".join(
        f"{len(split):,} {name}"
        for name, split in (("training", data.train), ("validation", data.validation), ("test", data.test))
        if split is not None
    )
