"""What the ablation measures, by value: of models whose features are known, and on held-out pairs of one's own, of
which it says what it cannot use.

B texts or pictures, T tokens, V words, D width.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import one_hot

from tests.recipes.shop import THINGS, drawing
from tests.search.conftest import make_bundle
from trivium.bundle import Bundle
from trivium.data.embedded import HELD_OUT_STYLE, ClipArt, Emoji, concept_numbers, emoji
from trivium.data.sources import open_source
from trivium.data.tokenizer import Tokenizer
from trivium.data.transforms import ImageTransform
from trivium.evaluate import ablation_figures
from trivium.evaluate.ablation_figures import FOLDS, measure
from trivium.evaluate.embedded import Drawings, Evaluation
from trivium.evaluate.features import ImageFeatures
from trivium.models.encoded import Encoded

CAPTIONS = [f"a {colour} {shape}" for colour, shape in THINGS[:6]]


def table(folder: Path, captions: list[str]) -> Path:
    """The third picture is no picture."""
    with (folder / "held-out.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for number, ((colour, shape), caption) in enumerate(zip(THINGS, captions, strict=False)):
            drawing(colour, shape).save(folder / f"{number}.png")
            writer.writerow([f"{number}.png", caption])
    (folder / "2.png").write_bytes(b"<html>404</html>")
    return folder / "held-out.csv"


def test_true_pairs_above_false_ones_and_a_broken_one_is_told(tmp_path: Path) -> None:
    bundle, said = make_bundle(0), []
    source = open_source("pairs", [table(tmp_path, CAPTIONS)])
    found = measure(bundle, ("retrieval", "matching"), pairs_held_out=source, say=said.append)
    [told] = [sentence for sentence in said if sentence.startswith("left out: ")]
    assert "a pair that cannot be read" in told and "held-out.csv" in told
    assert found["retrieval.pairs.text_to_image_r10"].n == found["retrieval.pairs.image_to_text_r10"].n == 5
    kept = [0, 1, 3, 4, 5]
    own = [float(bundle.match(str(tmp_path / f"{n}.png"), [CAPTIONS[n]])) for n in kept]
    others = [
        float(bundle.match(str(tmp_path / f"{n}.png"), [CAPTIONS[other]]))
        for n, other in zip(kept, [*kept[1:], kept[0]], strict=True)
    ]
    difference = np.subtract.outer(own, others)
    expected = ((difference > 0) + 0.5 * (difference == 0)).mean()
    assert found["itm.auroc"].value == pytest.approx(expected)


def test_rows_that_name_one_picture_are_matched_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, bundle = table(tmp_path, CAPTIONS), make_bundle(0)
    once = measure(bundle, ("matching",), pairs_held_out=open_source("pairs", [path]))
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"{number}.png,number {number}\n" for number in range(len(CAPTIONS)))
    several = open_source("pairs", [path])
    assert measure(bundle, ("matching",), pairs_held_out=several) == once, "interval and number too"
    outcomes = once["itm.auroc"].outcomes
    assert outcomes is not None and len(outcomes.units) == 5
    monkeypatch.setattr(ablation_figures, "MOST_PAIRS", 3)
    assert measure(bundle, ("matching",), pairs_held_out=several)["itm.auroc"].n == 6, "two pairs of each picture"


def test_pairs_that_all_say_the_same_are_not_matched_and_that_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    source = open_source("pairs", [table(tmp_path, ["a thing"] * 4)])
    found = measure(make_bundle(0), ("retrieval", "matching"), pairs_held_out=source, say=said.append)
    assert not any(name.startswith("itm") for name in found)
    assert any("matching is not measured" in sentence for sentence in said)


# ------------------------------------------------------------------------------------------- known features


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
COLOURS = ["red", "blue", "green", "black", "white", "grey"]
VOCABULARY = [*SPECIAL, *COLOURS, "pink", "old", "mug", "cat", "a", "fine", "bad", "film"]
FOLLOWS = {"[CLS]": "pink", "pink": "mug", "old": "cat"}  # the word that stands before -> the guess


class Lookup(nn.Module):
    """A text's class token says which words it holds, every other token which word stands before it; a picture's class
    token is its mean colour."""

    def __init__(self) -> None:
        super().__init__()
        self.guess_VV = nn.Parameter(torch.zeros(len(VOCABULARY), len(VOCABULARY)))
        with torch.no_grad():
            for before, guess in FOLLOWS.items():
                self.guess_VV[VOCABULARY.index(before), VOCABULARY.index(guess)] = 1.0

    def encode_text(self, ids_BT: Tensor, mask_BT: Tensor) -> Encoded:
        words_BTV = one_hot(ids_BT, len(VOCABULARY)).float()
        held_BV = (words_BTV * mask_BT[:, :, None]).sum(1)
        return Encoded(torch.cat([held_BV[:, None], words_BTV[:, :-1]], dim=1), mask_BT, nn.Identity(), None)

    def predict_words(self, states_BV: Tensor) -> Tensor:
        return states_BV @ self.guess_VV

    def encode_image(self, pixels_BCHW: Tensor) -> Encoded:
        return Encoded(pixels_BCHW.mean((2, 3))[:, None].expand(-1, 2, -1), None, nn.Identity(), None)


def lookup() -> Bundle:
    tokenizer = Tokenizer.wordpiece(VOCABULARY, True)
    return Bundle("lookup", Lookup().eval(), tokenizer, ImageTransform(8), max_length=16)


def named(name: str, split: str, group: str, subgroup: str, style: str = "twemoji") -> Emoji:
    return Emoji(b"", style, name, (), group, subgroup, name, split, 0, 0)


NAMED = [
    *(named(f"{colour} mug", "train", "things", "kitchen") for colour in COLOURS),
    *(named(f"{colour} cat", "train", "beasts", "pets") for colour in COLOURS),
    named("pink mug", "val", "things", "kitchen"),
    named("pink mug", "val", "things", "kitchen", "noto"),  # one name, asked once
    named("pink cat", "test", "things", "kitchen"),  # its words say beasts and pets
    named("old cat", "test", "beasts", "zoo"),  # a subgroup that training has not
    named("mug", "test", "", ""),  # of no group
]
GLUE_FILES = {
    "SST-2": (
        ["sentence\tlabel", *(f"{colour} {word} film\t{label}" for colour in COLOURS
                              for word, label in (("fine", 1), ("bad", 0)))],
        ["sentence\tlabel", "fine film\t1", "bad\t0", "a fine pink film\t0"],
    ),
    "CoLA": (
        [f"x\t{label}\t\t{colour} {word} film" for colour in COLOURS for word, label in (("fine", 1), ("bad", 0))],
        [f"x\t{label}\t\t{text}" for text, label in (("fine", 1), ("a fine film", 1), ("fine film", 0), ("bad", 0),
                                                     ("a bad film", 1))],
    ),
    "RTE": (  # by both sentences together alone: each word stands as often in the one class as in the other
        ["index\tsentence1\tsentence2\tlabel",
         *(f"{n}\t{one}\t{two}\t{'entailment' if one == two else 'not_entailment'}" for n in range(6)
           for one in ("fine", "bad") for two in ("fine", "bad"))],
        ["index\tsentence1\tsentence2\tlabel", "0\tfine\tfine\tentailment", "1\tbad\tfine\tnot_entailment",
         "2\tfine\tbad\tentailment", "3\tbad\tbad\tentailment"],
    ),
}  # fmt: skip


def test_language_by_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation_figures, "emoji", lambda: NAMED)
    for task, (train, dev) in GLUE_FILES.items():
        folder = tmp_path / "glue" / task
        folder.mkdir(parents=True)
        for split, lines in (("train", train), ("dev", dev)):
            (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    found = measure(lookup(), ("language", "masked words"), root=tmp_path)
    assert set(found) == {"names.group", "names.subgroup", "masked_words", "glue.sst2", "glue.cola", "glue.rte"}
    assert (found["names.group"].value, found["names.group"].n) == (pytest.approx(2 / 3), 3)
    assert found["names.subgroup"].value == pytest.approx(1 / 3)
    assert found["names.group"].outcomes is not None
    assert sorted(found["names.group"].outcomes.units) == ["old cat", "pink cat", "pink mug"]
    masked = found["masked_words"]
    assert masked.outcomes is not None
    assert dict(zip(masked.outcomes.units, masked.outcomes.values.tolist(), strict=True)) == {
        "mug, token 1": 0, "old cat, token 1": 0, "old cat, token 2": 1, "pink cat, token 1": 1,
        "pink cat, token 2": 0, "pink mug, token 1": 1, "pink mug, token 2": 1,
    }  # fmt: skip
    assert found["glue.sst2"].value == pytest.approx(2 / 3)
    # Three said to be acceptable, of which two are; two said not to be, of which one is: 3 of 5 are right.
    assert found["glue.cola"].value == pytest.approx((2 * 1 - 1 * 1) / (3 * 2 * 3 * 2) ** 0.5)
    assert found["glue.rte"].value == pytest.approx(3 / 4)
    assert found["glue.rte"].n == 4


def test_categories_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by colour: 8 red and 8 green ones to learn from; of those asked the last has a category of its own."""

    def record(row: int, split: str, colour: tuple[int, int, int], category: str) -> ClipArt:
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), colour).save(buffer, "PNG")
        return ClipArt(buffer.getvalue(), "a thing", (), category, split, row, row)

    known = [*(record(n, "train", (200 + n, 10, 20), "signs/stop") for n in range(8)),
             *(record(8 + n, "train", (10, 200 + n, 20), "signs/go") for n in range(8))]  # fmt: skip
    asked = [
        record(16, "val", (250, 0, 0), "signs/stop"), record(17, "val", (0, 250, 0), "signs/go"),
        record(18, "test", (0, 220, 0), "signs/stop"), record(19, "test", (0, 220, 0), "signs/yield"),
    ]  # fmt: skip
    monkeypatch.setattr(ablation_figures, "clipart", lambda split: [r for r in known + asked if r.split == split])
    found = Evaluation()
    ablation_figures._categories(found, lookup())
    assert set(found.results) == {"knn.category", "probe.category"}
    for result in found.results.values():
        assert result.value == pytest.approx(2 / 3)
        assert result.outcomes is not None and result.outcomes.units == ("clip art 16", "clip art 17", "clip art 18")
        assert result.outcomes.values.tolist() == [1, 1, 0]


def drawn_with(records: list[Emoji], features_of: dict[str, Tensor]) -> Drawings:
    rows_BD = torch.stack([features_of[record.codepoints] for record in records])
    return Drawings(records, [], ImageFeatures(rows_BD, rows_BD, None), torch.zeros(len(records), dtype=torch.int64))


def test_subgroups_are_told_without_ones_own_concept() -> None:
    """Concepts of two subgroups in pairs: each has its partner, of the other subgroup, nearest beside itself. So the
    same thing in another style is right, whatever else is there is wrong, and with it left out nothing may be right."""
    numbers, by_subgroup = concept_numbers(emoji()), {}
    for record in emoji("twemoji", "train"):
        by_subgroup.setdefault(record.subgroup, {})[record.codepoints] = numbers[record.codepoints]
    noto = {record.codepoints: record for record in emoji(HELD_OUT_STYLE, "train")}
    one, other = (by_subgroup[name] for name in ("mammals", "clothing"))
    pairs: list[tuple[str, str]] = []
    for mine in one:
        taken = {concept for pair in pairs for concept in pair}
        # In another fold of the probe, so that it is learned from where the query is not.
        strange = (c for c in other if c not in taken and c in noto and other[c] % FOLDS != one[mine] % FOLDS)
        if mine in noto and (theirs := next(strange, None)) is not None:
            pairs.append((mine, theirs))
    assert len(pairs) > 10
    # A cosine of 0.9 between partners; long, so that the probe reads them, whatever its C, and not the classes' sizes.
    near, own = 100 * torch.eye(len(pairs)), 23 * torch.eye(len(pairs))
    misleading = {mine: torch.cat([near[n], own[n]]) for n, (mine, _) in enumerate(pairs)}
    misleading |= {theirs: torch.cat([near[n], -own[n]]) for n, (_, theirs) in enumerate(pairs)}
    queries = [noto[concept] for concept in misleading]
    gallery = [record for style in ("twemoji", "fluent-3d") for record in emoji(style, "train")
               if record.codepoints in misleading]  # fmt: skip
    found = Evaluation()
    drawings = (drawn_with(queries, misleading), drawn_with(gallery, misleading))
    ablation_figures._subgroups(found, *drawings, torch.device("cpu"))
    assert found.results["knn.subgroup"].value == 1.0
    assert found.results["knn.other_concepts.subgroup"].value == 0.0
    assert found.results["probe.other_concepts.subgroup"].value == 0.0
    assert found.results["probe.other_concepts.subgroup"].n == len(queries)
    # Where features tell the subgroup, nothing is lost without one's own concept.
    honest = {concept: torch.tensor([1.0, 0.0] if concept in one else [0.0, 1.0]) for concept in misleading}
    drawings = (drawn_with(queries, honest), drawn_with(gallery, honest))
    ablation_figures._subgroups(found, *drawings, torch.device("cpu"))
    assert found.results["knn.other_concepts.subgroup"].value == 1.0
    assert found.results["probe.other_concepts.subgroup"].value == 1.0
