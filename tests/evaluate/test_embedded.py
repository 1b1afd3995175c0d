"""The whole suite with a very small random model, and the page that shows it."""

from __future__ import annotations

import io
import json
import re
import tracemalloc
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.evaluate.names import OF_THE_MODEL
from trivium.bundle import Bundle
from trivium.data.decode import decode
from trivium.data.embedded import HELD_OUT_STYLE, corpus, emoji
from trivium.data.sources import open_source
from trivium.data.tokenizer import Tokenizer
from trivium.data.transforms import ImageTransform
from trivium.errors import BadSample
from trivium.evaluate import embedded, features, pairs, report
from trivium.evaluate.embedded import Evaluation
from trivium.evaluate.results import Result
from trivium.evaluate.retrieval import ranks_by_cosine, summary
from trivium.evaluate.walls import Picture, Query, Wall
from trivium.methods.flava import LOSSES
from trivium.models.encoded import Encoded
from trivium.models.flava import Flava, FlavaConfig
from trivium.models.patch_codebook import PatchCodebook
from trivium.models.unit import Unit, UnitConfig, UnitTask
from trivium.train.protocol import Sample


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(corpus(), 500)
    shape = {"width": 16, "num_heads": 2, "mlp_width": 16, "image_layers": 1, "text_layers": 1, "multimodal_layers": 1}
    config = FlavaConfig.of_size(
        "tiny", **shape, patch_size=32, vocab_size=tokenizer.vocab_size, num_codes=8, projection_width=8
    )
    model = Flava(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pixels = torch.stack([ImageTransform(64)(record.image) for record in emoji(HELD_OUT_STYLE)[:50]])
    codebook = PatchCodebook.fit([pixels], num_codes=8, patch_size=32)
    return Bundle("flava", model.eval(), tokenizer, ImageTransform(64), codebook)


@pytest.fixture(scope="module")
def evaluation(bundle: Bundle) -> Evaluation:
    return embedded.run(bundle, false_share=0.3)


def test_results_have_the_promised_names_and_sizes(evaluation: Evaluation) -> None:
    found = evaluation.results
    assert found.keys() == OF_THE_MODEL
    sizes = {name: found[name].n for name in OF_THE_MODEL}
    assert {n for name, n in sizes.items() if name.startswith("retrieval.style")} == {1366}
    assert {n for name, n in sizes.items() if name.startswith("retrieval.concepts")} == {160}
    assert {n for name, n in sizes.items() if name.startswith(("zero_shot", "knn", "probe"))} == {1652}
    for result in found.values():
        assert result.low is not None
        assert result.high is not None
        assert result.low <= result.value <= result.high


def test_a_random_model_is_near_chance_and_pixels_are_where_they_were_measured(evaluation: Evaluation) -> None:
    found, chance = evaluation.results, evaluation.chance
    assert found["retrieval.style.text_to_image_r10"].value < 0.02
    assert chance["retrieval.style.text_to_image_r10"] == pytest.approx(0.006, abs=1e-4)
    assert found["itm.auroc"].value == pytest.approx(0.5, abs=0.05)
    assert found["retrieval.style.image_to_image.pixels_r1"].value == pytest.approx(0.37, abs=0.01)


def test_a_perfect_text_tower_is_seen_as_perfect(bundle: Bundle, evaluation: Evaluation) -> None:
    """Names that get the vectors of their own pictures are found every time, byte-equal pictures or not."""
    noto = embedded.drawings(bundle, emoji(HELD_OUT_STYLE), embedded.concept_numbers(emoji(HELD_OUT_STYLE)))
    distinct = torch.nn.functional.one_hot(noto.concepts.unique(return_inverse=True)[1]).float()
    found = Evaluation()
    embedded.retrieve(found, noto, distinct, distinct)
    assert {result.value for name, result in found.results.items() if "_r" in name} == {1.0}


class PicturesAlone(torch.nn.Module):
    """What a family without a text encoder offers: FLAVA's image encoder, and no space shared with texts."""

    def __init__(self, flava: Flava) -> None:
        super().__init__()
        self.flava = flava

    def encode_image(self, pixels_BCHW: torch.Tensor) -> Encoded:
        encoded = self.flava.encode_image(pixels_BCHW)
        return Encoded(encoded.states, None, self.flava.image.norm, None)


def test_a_model_that_reads_no_texts_is_measured_on_pictures_and_says_what_is_left_out(
    bundle: Bundle, evaluation: Evaluation
) -> None:
    assert isinstance(bundle.model, Flava)
    found = embedded.run(Bundle("pictures", PicturesAlone(bundle.model), None, bundle.transform))
    shared = {
        name for name in evaluation.results if name.startswith(("knn", "probe", "retrieval.style.image_to_image"))
    }
    shared -= {"retrieval.style.image_to_image_r1", "retrieval.style.image_to_image.projected_r1"}
    assert found.results.keys() == shared | {"retrieval.style.image_to_image_r1"}
    assert {name: found.results[name].value for name in shared} == {
        name: evaluation.results[name].value for name in shared
    }
    headline = found.results["retrieval.style.image_to_image_r1"]
    assert headline == found.results["retrieval.style.image_to_image.class_token_r1"]
    assert [sentence.partition(":")[0] for sentence in found.not_applicable] == [
        "retrieval by text and zero-shot classification",
        "image-text matching",
    ]
    assert len(found.walls) == 1
    assert "Picture to picture" in report.render(report.Report("pictures alone", found))


def test_false_partners_are_wrong_for_their_rows() -> None:
    records = emoji(split="val")
    concepts = embedded.concept_numbers(records)
    partners = embedded.false_partners(records)
    for record, partner in zip(records, partners, strict=True):
        other = records[partner]
        assert record.name != other.name
        assert concepts[record.codepoints] != concepts[other.codepoints]
    assert partners == embedded.false_partners(records)


def test_reconstruction_keeps_what_was_not_hidden(evaluation: Evaluation) -> None:
    assert evaluation.reconstructions
    for sample in evaluation.reconstructions:
        hidden = (sample.original != sample.masked).any(axis=-1)
        blocks = hidden.reshape(2, 32, 2, 32).any(axis=(1, 3)).repeat(32, 0).repeat(32, 1)
        assert np.array_equal(sample.from_picture[~blocks], sample.true_codes[~blocks])
        assert sample.num_masked == 1
        assert 0 <= sample.right <= 1


def test_a_model_without_matching_is_told_so(bundle: Bundle, evaluation: Evaluation) -> None:
    class Towers(torch.nn.Module):
        pass

    found = Evaluation()
    noto = embedded.Drawings([], [], embedded.ImageFeatures(*[torch.zeros(0, 1)] * 3), torch.zeros(0))
    embedded.match(found, Bundle("towers", Towers(), None, bundle.transform), noto, noto, 0.5)
    assert found.not_applicable == ["image-text matching: Towers has no `match`"]
    assert not found.results


def test_a_head_of_matching_that_no_loss_has_reached_is_not_asked(
    bundle: Bundle, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flava, "match", None)
    found = embedded.run(replace(bundle, fusion_trained=False))
    asked = {name for name in evaluation.results if "reranked" in name or name.startswith("itm.")}
    assert len(asked) > 2 and {name for name in evaluation.results if name not in asked} == set(found.results)
    assert "image-text matching, and re-ranking by it: no loss has trained what this model reads" in " ".join(
        found.not_applicable
    )


# ------------------------------------------------------------------------------------------------- the page

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Fails on a tag that is not closed in order; collects what a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "poster", "data")]
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"


MONITORS = [
    {"step": step, "stream": "pairs", "monitor": monitor, "subject": subject, "value": value, "threshold": 0.2} | said
    for step, monitor, subject, value, said in (
        (100, "duplicates", "same_image", 0.31, {"sentence": "31% of the rows of a batch <repeat> another"}),
        (200, "duplicates", "same_image", 0.1234, {}),
        (200, "collapse", "image", 7.4, {}),
    )
]


def full(evaluation: Evaluation) -> report.Report:
    values = dict.fromkeys(LOSSES, (2.0, 2.5))
    curves = {name: [(step, 3.0 - step / 100) for step in range(10, 100, 10)] for name in LOSSES}
    return report.Report(
        "Demo", evaluation, values, curves, {"train": 61.0, "total": 99.5}, {"cpu": "x", "gpus": []}, {"optim.lr": 0.1},
        command="trivium demo", monitors=MONITORS,
        measured={"knn.subgroup": [(500, 0.1), (1000, 0.25)], "knn.group": [(1000, 0.5)]},
    )  # fmt: skip


def test_page_is_well_formed_and_needs_nothing_else(evaluation: Evaluation) -> None:
    text = report.render(full(evaluation))
    page = Page(text)
    assert page.images
    assert all(source.startswith("data:image/") for source in page.loads)
    assert all(image.get("alt") for image in page.images)
    assert "script" not in page.tags
    assert not re.search(r"@import|url\(", text)
    for title in (
        "Ask in words",
        "What it was taught",
        "Finding",
        "Sorting",
        "Filling in what is hidden",
        "While it trained",
        "<b>Step 100 (pairs):</b> 31% of the rows of a batch &lt;repeat&gt; another.",
        "0.123",  # the last figure
        "Subgroup, by nearest neighbours: step 500: 10.0\N{NO-BREAK SPACE}%; step 1,000: 25.0\N{NO-BREAK SPACE}%",
        "1 min 01 s",
    ):
        assert title in text
    assert text.count("<b>Step ") == 1
    assert "Group, by nearest neighbours" not in text  # measured once: no curve


def test_page_of_nothing_has_no_empty_section() -> None:
    text = report.render(report.Report("Empty", Evaluation()))
    Page(text)
    for title in (
        "Ask in words",
        "What it was taught",
        "Finding",
        "Sorting",
        "Telling",
        "Filling in",
        "While it trained",
        "Time and machine",
    ):
        assert title not in text
    assert "Use it" in text


def test_page_escapes_hostile_strings() -> None:
    evil = "\"><script>alert('x')</script><img src=http://evil/x.png>"
    picture = Picture(b"not a picture", evil, right=True)
    wall = Wall(evil, evil, [Query(evil, picture, 1, [picture], True)])
    hostile = report.Report(
        evil, Evaluation(walls=[wall], not_applicable=[evil], seconds={evil: 1.0}), machine={evil: evil},
        config={evil: evil}, command=evil, model_path=evil, note=evil,
    )  # fmt: skip
    page = Page(report.render(hostile))
    assert "script" not in page.tags
    assert all(source.startswith("data:image/") for source in page.loads)


def test_page_shows_losses_that_diverged_or_have_no_curve() -> None:
    shown = report.Report(
        "x", Evaluation(), {"mim": (float("nan"), 2.0), "mlm": (3.0, 0.0)}, {"itm": [(1, float("nan"))]}
    )
    text = report.render(shown)
    Page(text)
    assert "nan" in text
    assert "3.000" in text


def test_headline_leads_with_the_figure(evaluation: Evaluation) -> None:
    results = {"retrieval.style.text_to_image_r10": Result(0.27)}
    (sentence,) = report.headline(Evaluation(results, {"retrieval.style.text_to_image_r10": 0.006}))
    assert "27.0\N{NO-BREAK SPACE}% of the time: 45 times a blind guess" in sentence


def test_the_mean_of_patches_of_a_model_without_a_class_token_leaves_none_out() -> None:
    """Nor does it count what pads a smaller picture."""
    torch.manual_seed(0)
    config = UnitConfig.of_size("tiny", tasks=(UnitTask("vg", "detection", "image", 5, 0, 4),), text_layers=0)
    bundle = Bundle("unit", Unit(config), None, ImageTransform(32, crop="shortest", longest=48))
    pictures = [np.random.default_rng(0).integers(0, 255, (32, width, 3), np.uint8) for width in (32, 48)]
    found = features.of_pictures(bundle, pictures).mean_of_patches
    alone = [bundle.encode_image([picture]).tokens.mean(dim=1) for picture in pictures]
    torch.testing.assert_close(found, torch.cat(alone))


class LargePictures:
    """A source of captioned pictures of 1500 x 1500 pixels, each of a colour of its own."""

    def __len__(self) -> int:
        return 40

    def blocks(self) -> list[range]:
        return [range(len(self))]

    def read(self, image_row: int, text_row: int) -> Sample:
        if image_row == 7:
            raise BadSample("large.csv", "line 9", "its picture does not exist")
        file = io.BytesIO()
        Image.new("RGB", (1500, 1500), (6 * image_row, 255 - 6 * image_row, 90)).save(file, "PNG", compress_level=1)
        names = {"image": file.getvalue(), "texts": [f"the picture {text_row}", f"number {text_row}"]}
        return {**names, "same_image": image_row, "same_text": text_row, "name": f"row {image_row}"}  # type: ignore[typeddict-item]

    def lengths(self) -> None:
        return None


def test_pairs_of_large_pictures_are_never_decoded_in_memory_at_once(bundle: Bundle) -> None:
    source = LargePictures()
    tracemalloc.start()
    found = pairs.run(bundle, source)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 1500 * 1500 * 3  # far fewer than 39 of them
    assert found.not_applicable == ["a pair that cannot be read: large.csv (line 9): its picture does not exist"]
    assert found.results["retrieval.pairs.image_to_text_r1"].n == 39
    assert found.results["retrieval.pairs.text_to_image_r1"].n == 78
    # The same figures as with all pictures side by side.
    samples = [source.read(row, row) for row in range(40) if row != 7]
    images_BD = features.of_pictures(bundle, [decode(sample["image"]) for sample in samples]).projected
    texts_BD = features.of_texts(bundle, [text for sample in samples for text in sample["texts"]])
    labels = torch.arange(39)
    ranks = ranks_by_cosine(images_BD, texts_BD, labels, labels.repeat_interleave(2))
    assert found.results["retrieval.pairs.image_to_text_median_rank"].value == float(np.median(ranks))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rows_that_name_one_picture_are_one_picture_with_several_captions(
    bundle: Bundle, tmp_path: Path, interleaved: bool
) -> None:
    said = {f"{n}.png": [f"{word} number {n}" for word in ("a", "one", "the")] for n in range(9)}
    for n, name in enumerate(said):
        Image.new("RGB", (40, 40), (25 * n, 255 - 25 * n, 90)).save(tmp_path / name)
    listed, by_row = tmp_path / "listed.jsonl", tmp_path / "by-row.csv"
    listed.write_text("".join(json.dumps({"image": name, "caption": texts}) + "\n" for name, texts in said.items()))
    rows = [f"{name},{text}\n" for name, texts in said.items() for text in texts]
    by_row.write_text("image,caption\n" + "".join(sorted(rows, key=lambda row: row[4:]) if interleaved else rows))
    one, other = (pairs.run(bundle, open_source("pairs", [path])) for path in (listed, by_row))
    assert one.results["retrieval.pairs.image_to_text_r1"].n == 9
    assert one.results["retrieval.pairs.text_to_image_r1"].n == 27
    assert other.results == one.results and other.chance == one.chance
    kept = other.results["retrieval.pairs.text_to_image_r5"].outcomes
    assert kept is not None and kept.groups is not None and len(set(kept.groups)) == 9
    few = pairs.run(bundle, open_source("pairs", [by_row]), limit=4)
    if interleaved:  # the rows before the one that names a fifth
        assert few.results["retrieval.pairs.text_to_image_r1"].n == 4
    else:
        assert few.results["retrieval.pairs.text_to_image_r1"].n == 12
        assert few.not_applicable == ["pairs beyond the first 12 of 27"]
    (tmp_path / "2.png").write_bytes(b"no picture")
    less = pairs.run(bundle, open_source("pairs", [by_row]))
    assert less.results["retrieval.pairs.image_to_text_r1"].n == 8
    assert len([sentence for sentence in less.not_applicable if "cannot be read" in sentence]) == 3, "each of its rows"


def test_captions_of_marks_that_the_model_leaves_out_are_no_queries(bundle: Bundle, tmp_path: Path) -> None:
    assert bundle.tokenizer is not None
    told = [["a dog", "..."], "?!", "a cat", "a red cat"]
    for n in range(4):
        Image.new("RGB", (40, 40), (60 * n, 9, 90)).save(tmp_path / f"{n}.png")
    rows = [{"image": f"{n}.png", "caption": text} for n, text in zip((0, 1, 2, 1), told, strict=True)]
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(rows))
    found = pairs.run(replace(bundle, tokenizer=bundle.tokenizer.for_captions()), open_source("pairs", [path]))
    assert found.results["retrieval.pairs.image_to_text_r1"].n == 3
    kept = found.results["retrieval.pairs.text_to_image_r1"].outcomes
    assert kept is not None
    assert list(kept.units) == [f"{path} (entry {n}), caption 1" for n in (0, 2, 3)]
    assert found.not_applicable == [
        f"a pair that cannot be read: {path} (entry {n}), caption {number}: it holds nothing that this model reads,"
        " only marks that it leaves out" for n, number in ((0, 2), (1, 1))
    ]  # fmt: skip
    assert pairs.run(bundle, open_source("pairs", [path])).not_applicable == []


def test_rows_that_come_twice_count_once_and_that_is_said(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    table = tmp_path / "photos.csv"
    table.write_text("image,caption\n" + "".join(f"photos/{n}.png,row {n}\n" for n in range(4)))
    for n in range(4):
        Image.new("RGB", (40, 40), (50 * n, 255 - 50 * n, 90)).save(tmp_path / "photos" / f"{n}.png")
        (tmp_path / "photos" / f"{n}.txt").write_text(f"the picture {n}\nnumber {n}\n")
    for paths, n, first in (
        ([tmp_path, tmp_path / "photos"], 8, f"{tmp_path}/photos/0.png"),
        ([table, f"{tmp_path}/./photos.csv"], 4, f"{tmp_path}/./photos.csv (line 2)"),
    ):
        once, twice = (pairs.run(bundle, open_source("pairs", some)) for some in (paths[:1], paths))
        assert once.results["retrieval.pairs.text_to_image_r1"].n == n and once.not_applicable == []
        assert (twice.results, twice.chance) == (once.results, once.chance)
        assert twice.not_applicable == [f"rows that come again (4, the first: {first})"]


def test_page_shows_captioned_pictures_of_ones_own() -> None:
    ranks = torch.tensor([1, 3, 40])
    found = summary(ranks, "retrieval.pairs.text_to_image")
    text = report.render(report.Report("x", Evaluation(found, dict.fromkeys(found, 0.01))))
    Page(text)
    assert "Captioned pictures" in text
    assert "66.7\N{NO-BREAK SPACE}% of the time: 67 times a blind guess" in text
    assert "1,678" not in text


def test_curves_are_read_past_a_line_that_was_cut(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(
        b'{"step": 1, "stream": "images", "losses": {"mim": 6.5}}\n{"step": 2, "results": {}}\n\xff\n'
        b'{"step": 2, "stream": "images", "losses": {"mim": null}}\n{"step": 3, "losses": {"mi'
    )
    assert report.read_curves(metrics) == {"mim": [(1.0, 6.5)]}
    assert report.read_curves(tmp_path / "none.jsonl") == {}
