"""What the data doctor finds in made data of which the truth is known, and that it is silent on clean data."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.drawn import photograph
from trivium.data.collate import ImageCollate, ImageInput, PairCollate, TextCollate, TextInput
from trivium.data.doctor import Diagnosis, conclude, diagnose
from trivium.data.findings import Finding
from trivium.data.sources import open_source
from trivium.data.survey import Survey, rows_of, survey
from trivium.data.tokenizer import Tokenizer
from trivium.data.views import Views
from trivium.train.protocol import Stream

MAX_LENGTH = 16
VIEWS = Views(32)
WORDS = ("amber", "boat", "cedar", "dune", "ember", "fjord", "grove", "harbour")
Row = tuple[str, str]


def sentence(number: int) -> str:
    """Another one for each number below 512."""
    first, second, third = (WORDS[number // 8**place % 8] for place in range(3))
    return f"a {first} by the {second} near a {third}"


TOKENIZER = Tokenizer.train([sentence(number) for number in range(512)], 200)


def save(path: Path, picture: Image.Image, **settings: object) -> None:
    picture.save(path, **settings)  # type: ignore[arg-type]


def stream_of(kind: str, path: Path, name: str | None = None, batch: int = 8, max_length: int = MAX_LENGTH) -> Stream:
    image, text = ImageInput(VIEWS, 8), TextInput(TOKENIZER, max_length)
    collate = {"pairs": PairCollate(image, text), "images": ImageCollate(image), "text": TextCollate(text)}[kind]
    return Stream(name or kind, open_source(kind, [path]), collate, batch, batch)  # type: ignore[arg-type]


def read(stream: Stream, sample: int = 10**9) -> Survey:
    return survey(stream, VIEWS.decode, TOKENIZER, seed=0, sample=sample, threads=2)


def conclusion(
    train: Sequence[Stream], held_out: Sequence[Stream] = (), queue: int = 4
) -> tuple[Diagnosis, dict[tuple[str, str], Finding]]:
    found = conclude([read(each) for each in train], [read(each) for each in held_out], queue=queue)
    json.dumps(found.as_json(), allow_nan=False)
    by_kind = {(finding.stream, finding.kind): finding for finding in found.findings}
    assert len(by_kind) == len(found.findings)
    return found, by_kind


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """Write a CSV of `numbers`: photographs with their sentences, and other rows."""

    def write(name: str, numbers: range, more: Sequence[Row] = ()) -> Path:
        rows = [("image", "caption")]
        for number in numbers:
            save(tmp_path / f"{number}.png", photograph(number))
            rows.append((f"{number}.png", sentence(number)))
        path = tmp_path / name
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([*rows, *more])
        return path

    return write


def test_clean_data_has_no_findings(table: Callable[..., Path], tmp_path: Path) -> None:
    pairs, held_out = table("train.csv", range(40)), table("validation.csv", range(100, 120))
    (tmp_path / "lines.txt").write_text("\n".join(sentence(number) for number in range(200, 260)))
    streams = [stream_of("pairs", pairs), stream_of("images", pairs), stream_of("text", tmp_path / "lines.txt")]
    found, findings = conclusion(streams, [stream_of("pairs", held_out, "validation")])
    assert findings == {}
    assert found.notes == []
    assert found.floor["loss"] == pytest.approx(0, abs=1e-9)
    assert (found.floor["batches"], found.floor["rows"], found.floor["chance"]) == (5, 8, math.log(8))
    facts = found.streams["pairs"]
    assert (facts.rows, facts.read, facts.unreadable, facts.pictures, facts.exact, facts.near) == (40, 40, 0, 40, 0, 0)
    assert (facts.captions, facts.distinct_captions, facts.median_width, facts.median_height) == (40, 40, 192, 144)
    assert facts.above_max_length == 0
    assert sum(facts.histogram.values()) == 40
    assert found.streams["text"].pictures is None


def test_every_sample_that_cannot_be_read_is_counted_and_named(table: Callable[..., Path], tmp_path: Path) -> None:
    broken = io.BytesIO()
    photograph(900).save(broken, "JPEG")
    save(tmp_path / "cut.png", photograph(901))
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    (tmp_path / "cut.jpg").write_bytes(broken.getvalue()[: len(broken.getvalue()) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "words.jpg").write_text("no picture at all")
    rows = [
        (name, sentence(300 + n)) for n, name in enumerate(("cut.png", "cut.jpg", "empty.jpg", "words.jpg", "no.jpg"))
    ]
    path = table("train.csv", range(20), [*rows, ("0.png", "  ")])
    found, findings = conclusion([stream_of("pairs", path)])
    finding = findings.pop(("pairs", "unreadable"))
    assert findings == {}
    assert (finding.count, len(finding.examples), found.streams["pairs"].unreadable) == (6, 6, 6)
    for line, example in enumerate(finding.examples, start=22):
        assert example.startswith(f"{path} (line {line}): ")
    assert finding.sentence.startswith("6 of 26 samples (23 %) cannot be read: above 1 % a run stops")


def test_exact_and_near_copies_are_counted_apart(table: Callable[..., Path], tmp_path: Path) -> None:
    save(tmp_path / "a.bmp", photograph(0))  # other bytes, the same pixels
    save(tmp_path / "b.png", photograph(0), compress_level=1)
    save(tmp_path / "c.png", photograph(1))
    save(tmp_path / "d.jpg", photograph(2), quality=60)
    save(tmp_path / "e.jpg", photograph(2).resize((96, 72), Image.Resampling.BICUBIC), quality=80)
    save(tmp_path / "f.webp", photograph(3), quality=80)
    names = ("a.bmp", "b.png", "c.png", "d.jpg", "e.jpg", "f.webp")
    path = table("train.csv", range(30), [(name, sentence(300 + n)) for n, name in enumerate(names)])
    found, findings = conclusion([stream_of("pairs", path, batch=36)])
    assert set(findings) == {("pairs", kind) for kind in ("exact-duplicates", "near-duplicates", "loss-floor")}
    exact, near = findings["pairs", "exact-duplicates"], findings["pairs", "near-duplicates"]
    assert (exact.count, len(exact.pictures)) == (3, 2)
    assert exact.pictures == ([("pairs", 0), ("pairs", 30), ("pairs", 31)], [("pairs", 1), ("pairs", 32)])
    assert (near.count, len(near.pictures)) == (3, 2)
    assert near.pictures == ([("pairs", 2), ("pairs", 33), ("pairs", 34)], [("pairs", 3), ("pairs", 35)])
    # One batch is the whole table: three pictures that are equal, and two.
    assert found.floor["loss"] == pytest.approx((3 * math.log(3) + 2 * math.log(2)) / 36)
    assert found.floor["from_pictures"] == found.floor["loss"]
    assert found.floor["from_captions"] == pytest.approx(0, abs=1e-9)
    assert found.streams["pairs"].pictures == 33


def test_rows_that_name_one_picture_are_several_captions_and_no_copies(table: Callable[..., Path]) -> None:
    more = [(f"{number}.png", sentence(300 + number)) for number in range(10)]
    found, findings = conclusion([stream_of("pairs", table("train.csv", range(20), more), batch=30)])
    finding = findings.pop(("pairs", "several-captions"))
    assert findings == {}
    assert (finding.count, finding.is_problem) == (10, False)
    assert found.streams["pairs"].captions_per_picture == 1.5
    assert found.floor["loss"] == pytest.approx(0, abs=1e-9)


def test_leakage_is_found_exactly_nearly_and_in_words(table: Callable[..., Path], tmp_path: Path) -> None:
    save(tmp_path / "x.bmp", photograph(4))
    save(tmp_path / "y.jpg", photograph(5), quality=60)
    save(tmp_path / "z.jpg", photograph(6), quality=60)
    more = [
        ("7.png", sentence(400)),
        ("x.bmp", sentence(401)),
        ("y.jpg", sentence(402)),
        ("z.jpg", sentence(8).upper()),
    ]
    pairs, held_out = table("train.csv", range(30)), table("validation.csv", range(100, 110), more)
    (tmp_path / "lines.txt").write_text(f"{sentence(100)}\n{sentence(200)}\n")
    train = [stream_of("pairs", pairs), stream_of("text", tmp_path / "lines.txt")]
    _, findings = conclusion(train, [stream_of("pairs", held_out, "validation")])
    assert {kind: finding.count for (_, kind), finding in findings.items()} == {
        "leakage-exact": 2, "leakage-near": 2, "leakage-captions": 2,
    }  # fmt: skip
    assert findings["validation", "leakage-exact"].pictures == (
        [("pairs", 7), ("validation", 10)],
        [("pairs", 4), ("validation", 11)],
    )
    assert findings["validation", "leakage-near"].pictures == (
        [("pairs", 5), ("validation", 12)],
        [("pairs", 6), ("validation", 13)],
    )
    # A caption in capitals reads the same to the model; one stands in the text stream alone.
    assert sorted(findings["validation", "leakage-captions"].examples) == sorted([sentence(100), sentence(8).upper()])


def test_captions_like_labels_and_the_floor_they_impose(tmp_path: Path) -> None:
    rows = [("image", "caption")]
    for number in range(48):
        save(tmp_path / f"{number}.png", photograph(number))
        rows.append((f"{number}.png", WORDS[number % 4]))
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    found, findings = conclusion([stream_of("pairs", tmp_path / "labels.csv", batch=48)])
    assert set(findings) == {("pairs", "label-like-captions"), ("pairs", "loss-floor")}
    finding = findings["pairs", "label-like-captions"]
    assert finding.count == 4
    assert "4 distinct for 48 pictures, the commonest beside 12 of 48 pictures (25 %)" in finding.sentence
    assert found.streams["pairs"].often == dict.fromkeys(WORDS[:4], 12)
    assert found.floor["loss"] == pytest.approx(math.log(12))
    assert found.floor["from_captions"] == pytest.approx(math.log(12))


def test_one_caption_that_stands_everywhere_is_like_a_label(table: Callable[..., Path], tmp_path: Path) -> None:
    path = table("train.csv", range(40))
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line.partition(",")[0] + ",no title" if n > 30 else line for n, line in enumerate(lines)))
    _, findings = conclusion([stream_of("pairs", path)])
    assert findings["pairs", "label-like-captions"].examples == ("10 x no title",)
    path.write_text("\n".join(line.partition(",")[0] + ",no title" if n > 31 else line for n, line in enumerate(lines)))
    _, findings = conclusion([stream_of("pairs", path)])
    assert set(findings) == {("pairs", "loss-floor")}


def test_captions_that_are_cut(table: Callable[..., Path], tmp_path: Path) -> None:
    more = []
    for number in range(3):
        save(tmp_path / f"{number}.png", photograph(number))
        long = f"{sentence(number)}, {sentence(number + 200)}, {sentence(number)}"
        more.append((f"{number}.png", long))
    found, findings = conclusion([stream_of("pairs", table("train.csv", range(3, 20), more))])
    finding = findings.pop(("pairs", "long-captions"))
    assert finding.count == 3
    facts = found.streams["pairs"]
    assert facts.above_max_length == 3 / 20
    lengths = [len(ids) for ids in TOKENIZER.encode([sentence(n) for n in range(3, 20)] + [t for _, t in more], 999)]
    assert facts.tokens["50 %"] == sorted(lengths)[10]
    assert facts.tokens["100 %"] == max(lengths)
    assert finding.advice.startswith(f"--data.max-length {max(lengths)} keeps 99 % whole")


def test_repeated_lines_of_text(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("\n".join([sentence(n) for n in range(20)] + [sentence(3)] * 2))
    _, findings = conclusion([stream_of("text", tmp_path / "lines.txt")])
    assert findings["text", "repeated-texts"].count == 2
    assert len(findings) == 1


def test_captions_without_an_end_are_told_apart_by_their_last_token(table: Callable[..., Path]) -> None:
    """Cut at 4 tokens, [CLS] among them, the first two are equal, and the third is not, though all end alike."""
    texts = ("amber boat cedar dune amber", "amber boat cedar ember amber", "amber boat dune dune amber")
    stream = stream_of("pairs", table("train.csv", range(1), [("0.png", text) for text in texts]), max_length=4)
    seen = survey(stream, VIEWS.decode, TOKENIZER.for_captions(), seed=0, sample=9, threads=1)
    digests = [sample.captions[0].tokens for sample in seen.samples[1:]]
    assert digests[0] == digests[1] != digests[2]


def test_each_stream_is_cut_at_its_own_length(table: Callable[..., Path], tmp_path: Path) -> None:
    """Texts alone may be longer; a stream of pictures reads no text of the pairs that it is taken from."""
    rows = [(f"{number}.png", " ".join(WORDS)) for number in range(8)]
    pairs, lines = table("train.csv", range(8), rows), tmp_path / "lines.txt"
    lines.write_text("\n".join(f"{' '.join(WORDS)} {sentence(number)}" for number in range(4)))
    pictures = replace(stream_of("pairs", pairs, "images"), collate=ImageCollate(ImageInput(VIEWS, 8)))
    alone = replace(stream_of("pairs", pairs, "text", max_length=6), collate=TextCollate(TextInput(TOKENIZER, 6)))
    train = [stream_of("pairs", pairs, max_length=8), pictures, alone]
    found, findings = conclusion(train, [stream_of("text", lines, "validation text", max_length=99)])
    cut = {stream: finding.advice for (stream, kind), finding in findings.items() if kind == "long-captions"}
    assert set(cut) == {"pairs", "text"}
    assert cut["pairs"].startswith("--data.max-length 10 ") and cut["text"].startswith("--data.text-length 10 ")
    limits = {name: facts.max_length for name, facts in found.streams.items()}
    assert limits == {"pairs": 8, "images": None, "text": 6, "validation text": 99}


def test_a_held_out_text_is_known_however_training_cuts_it(table: Callable[..., Path], tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    texts = [f"{' '.join(WORDS)} {sentence(number)}" for number in range(4)]
    lines.write_text("\n".join(texts))
    held_out = table("val.csv", range(2), [("0.png", texts[0]), ("1.png", f"{texts[0]} again")])
    _, findings = conclusion(
        [stream_of("text", lines, max_length=99)], [stream_of("pairs", held_out, "validation", max_length=6)]
    )
    assert findings["validation", "leakage-captions"].examples == (texts[0],)


@pytest.mark.parametrize(("queue", "said"), [(10, None), (11, "at most 10; a whole number of batches of 8 is 8")])
def test_a_queue_is_at_most_a_quarter_of_the_pairs(table: Callable[..., Path], queue: int, said: str | None) -> None:
    _, findings = conclusion([stream_of("pairs", table("train.csv", range(40)))], queue=queue)
    assert [
        finding.advice.removeprefix("where a recipe has a queue, as ALBEF does, let it hold ")
        for finding in findings.values()
    ] == ([] if said is None else [said])


def test_a_sample_is_whole_batches_of_the_run_and_says_so(table: Callable[..., Path]) -> None:
    stream = stream_of("pairs", table("train.csv", range(60)))
    rows, batches = rows_of(stream, seed=0, sample=20)
    assert [len(batch) for batch in batches] == [8, 8]
    assert sorted(set(np.concatenate(batches).tolist())) == rows.tolist()
    found = conclude([read(stream, sample=20)], [], queue=4)
    assert found.findings == []
    assert found.notes[0].startswith(f"pairs: {len(rows)} of 60 samples were read")
    everything, batches = rows_of(stream, seed=0, sample=60)
    assert everything.tolist() == list(range(60))
    assert len(set(np.concatenate(batches).tolist())) == 56  # seven whole batches of one epoch


def test_a_diagnosis_times_the_loader_and_outlives_data_that_cannot_be_read(
    table: Callable[..., Path], tmp_path: Path
) -> None:
    pairs = stream_of("pairs", table("train.csv", range(20)))
    (tmp_path / "bad").mkdir()
    for number in range(3):
        (tmp_path / "bad" / f"{number}.png").write_bytes(b"nothing")

    def examined(*train: Stream) -> Diagnosis:
        return diagnose(train, [], VIEWS.decode, TOKENIZER, seed=0, workers=0, threads=1, queue=4, seconds=2.0)

    found = examined(pairs)
    assert found.findings == []
    assert found.samples_per_second == pytest.approx(found.streams["pairs"].samples_per_second)
    found = examined(pairs, stream_of("images", tmp_path / "bad"))
    assert [(finding.kind, finding.count) for finding in found.findings] == [("unreadable", 3)]
    assert found.samples_per_second is None
    assert found.notes == [
        note for note in found.notes if note.startswith("the loader could not be timed: stream 'images'")
    ]
    assert found.streams["images"].pictures is None
