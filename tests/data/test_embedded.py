"""The data inside the package: that the files are the builder's, and that no stream shows what is held out."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trivium.data import embedded
from trivium.errors import TriviumError

ROOT = Path(__file__).parents[2]
BUILDERS = ROOT / "builders"
TABLES = ("emoji.parquet", "clipart.parquet", "glosses.parquet")


def words_of(name: str, keywords: tuple[str, ...]) -> set[str]:
    return {word.lower() for word in (name, *keywords)}


# ------------------------------------------------------------------------------------------------- the files


def test_every_file_has_its_checksum_and_together_they_stay_under_12_megabytes() -> None:
    lines = (embedded.FILES / "checksums.sha256").read_text().splitlines()
    stated = {name: checksum for checksum, name in (line.split("  ") for line in lines)}
    files = {path.name: path.read_bytes() for path in embedded.FILES.iterdir()}
    assert set(stated) == set(files) - {"checksums.sha256"}
    assert {name: hashlib.sha256(files[name]).hexdigest() for name in stated} == stated
    assert sum(map(len, files.values())) < 12e6


def test_row_counts() -> None:
    emoji, clipart = embedded.emoji(), embedded.clipart()
    assert Counter(record.style for record in emoji) == {
        "twemoji": 1940,
        "fluent-3d": 1854,
        "noto": 1678,
        "fluent-emoji-flat": 1594,
    }
    assert Counter(record.split for record in emoji) == {"train": 5728, "val": 657, "test": 681}
    assert len(clipart) == 5433
    assert Counter(record.split for record in clipart) == {"train": 4278, "val": 616, "test": 539}
    assert len({record.group for record in emoji} - {""}) == 9
    assert pq.read_metadata(embedded.FILES / "glosses.parquet").num_rows == 29292


def test_files_are_sorted_and_rows_count_from_zero() -> None:
    emoji = embedded.emoji()
    assert [record.row for record in emoji] == list(range(len(emoji)))
    order = [(record.style, record.codepoints) for record in emoji]
    assert order == sorted(order)
    assert [record.row for record in embedded.clipart()] == list(range(5433))


def test_no_logos_and_no_generated_shapes() -> None:
    categories = {record.category for record in embedded.clipart()}
    assert "logos" not in categories
    assert not any(category.startswith("shapes/stars") for category in categories)


def test_splits_follow_their_hash_and_no_concept_caption_or_synset_crosses() -> None:
    """One rule for all three files; the builder's words: 0 is test, 1 is val, the rest train."""
    keyed = [(record.codepoints, record.split) for record in embedded.emoji()]
    keyed += [(record.caption, record.split) for record in embedded.clipart()]
    keyed += [(row["synset"], row["split"]) for row in pq.read_table(embedded.FILES / "glosses.parquet").to_pylist()]
    for key, split in keyed:
        digit = int(hashlib.md5(key.encode()).hexdigest(), 16) % 10
        assert split == ("test" if digit == 0 else "val" if digit == 1 else "train"), key


def test_every_picture_is_64_pixels_rgb_and_not_blank() -> None:
    for record in (*embedded.emoji(), *embedded.clipart()):
        with Image.open(io.BytesIO(record.image)) as picture:
            assert (picture.format, picture.size, picture.mode) == ("WEBP", (64, 64), "RGB")
    for record in embedded.emoji():
        with Image.open(io.BytesIO(record.image)) as picture:
            assert np.asarray(picture).min() < 250, f"{record.style} {record.name} is blank"


def test_bert_vocabulary_is_the_published_one() -> None:
    pieces = embedded.bert_vocabulary()
    assert len(pieces) == len(set(pieces)) == 30522
    assert [pieces.index(piece) for piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 100, 101, 102, 103]
    assert [pieces.index(piece) for piece in ("dog", "##s", "[", "##～")] == [3899, 2015, 1031, 30521]
    data = (embedded.FILES / "bert_uncased_vocabulary.txt").read_bytes()
    assert hashlib.sha256(data).hexdigest() == "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"


# -------------------------------------------------------------------------------------------- for evaluation


def test_the_numbers_that_the_retrieval_protocols_state() -> None:
    candidates = embedded.emoji(style="noto")
    assert len(candidates) == len({record.codepoints for record in candidates}) == 1678
    assert len(embedded.emoji(style="noto", split="train")) == 1366  # retrieval.style
    assert len(embedded.emoji(style="noto", split="test")) == 160  # retrieval.concepts
    seen = {sample_number(row) for row in range(len(embedded.pairs()))}
    concepts = embedded.concept_numbers(embedded.emoji())
    shown = {concepts[record.codepoints] for record in embedded.emoji(style="noto", split="train")}
    # Each queried concept was drawn in another style, save those whose drawings equal a held-out one.
    assert len(shown - seen) <= 2


def sample_number(row: int) -> int:
    return embedded.pairs().read(row, row)["same_image"]


@pytest.mark.parametrize("read", [embedded.emoji, embedded.clipart])
def test_picture_numbers_are_equal_exactly_where_the_bytes_are(read: Callable[[], list]) -> None:
    records = read()
    pairs = {(record.image, record.picture) for record in records}
    assert len(pairs) == len({image for image, _ in pairs}) == len({number for _, number in pairs})
    assert len(pairs) < len(records)  # there are such pictures


def test_an_unknown_style_or_split_is_refused_with_the_choices() -> None:
    with pytest.raises(TriviumError, match=r"no style 'apple': choose one of .*twemoji"):
        embedded.emoji(style="apple")
    for make in (embedded.pairs, embedded.images, embedded.text, embedded.clipart):
        with pytest.raises(TriviumError, match=r"no split 'dev': choose one of train, val, test"):
            make("dev")


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "FILES", tmp_path)
    with pytest.raises(TriviumError, match=r"bert_uncased_vocabulary\.txt is missing"):
        embedded.bert_vocabulary()


# ------------------------------------------------------------------------------------------------ the streams


def test_no_stream_shows_a_held_out_picture() -> None:
    held_out = {record.image for record in embedded.emoji() if record.split != "train" or record.style == "noto"}
    held_out |= {record.image for record in embedded.clipart() if record.split != "train"}
    for source in (embedded.pairs(), embedded.images()):
        assert not held_out & {source.read(row, row)["image"] for row in range(len(source))}


def test_pairs_are_the_train_rows_of_three_styles_save_those_equal_to_a_held_out_picture() -> None:
    rows = [record for record in embedded.emoji(split="train") if record.style != "noto"]
    images = Counter(sample["image"] for sample in read_all(embedded.pairs()))
    missing = Counter(record.image for record in rows) - images
    assert not images - Counter(record.image for record in rows)
    held_out = {record.image for record in embedded.emoji() if record.split != "train"}
    assert 0 < missing.total() < 20
    assert set(missing) <= held_out


def test_the_text_stream_holds_no_held_out_name_or_title_as_an_entry() -> None:
    held_out = {record.name.lower() for record in embedded.emoji() if record.split != "train"}
    held_out |= {record.caption.lower() for record in embedded.clipart() if record.split != "train"}
    synsets = {row["text"] for row in pq.read_table(embedded.FILES / "glosses.parquet").to_pylist()}
    own = [sample["text"] for sample in read_all(embedded.text())]
    names_and_titles = [line for line in own if line not in synsets]
    assert len(names_and_titles) > 4000
    assert not held_out & {line.lower() for line in own}
    first = {record.name.lower() for record in embedded.emoji(split="train")}
    assert len(first & {line.split(", ")[0].lower() for line in names_and_titles}) > 1400


def test_no_caption_of_a_training_pair_holds_a_held_out_name_as_an_entry() -> None:
    emoji_names = {record.name.lower() for record in embedded.emoji() if record.split != "train"}
    titles = {record.caption.lower() for record in embedded.clipart() if record.split != "train"}
    names, keywords = set(), set()
    for sample in read_all(embedded.pairs()):
        name = sample["texts"][0]  # "family: man, man, boy" has commas of its own
        names.add(name.lower())
        keywords |= {word for text in sample["texts"] for word in text.removeprefix(name).lower().split(", ")[1:]}
    assert len(keywords) > 2000
    assert sorted(emoji_names & names) == []
    assert sorted((emoji_names | titles) & keywords) == []


def test_no_gloss_in_train_defines_a_held_out_name() -> None:
    held_out = {record.name.lower() for record in embedded.emoji() if record.split != "train"}
    held_out |= {record.caption.lower() for record in embedded.clipart() if record.split != "train"}
    rows = pq.read_table(embedded.FILES / "glosses.parquet").to_pylist()
    glosses = {row["text"]: embedded.lemmas(row["text"].lower()) for row in rows if row["split"] == "train"}
    dropped = [text for text, words in glosses.items() if held_out & set(words)]
    train = {sample["text"] for sample in read_all(embedded.text())}
    assert 100 < len(dropped) < 400
    assert set(glosses) - train == set(dropped)
    assert any(text.startswith("sun, ") or "sun" in glosses[text] for text in dropped)


def test_glosses_of_val_and_test_are_not_in_train() -> None:
    train = {sample["text"] for sample in read_all(embedded.text())}
    for split in ("val", "test"):
        others = {sample["text"] for sample in read_all(embedded.text(split))}
        glosses = {line for line in others if ": " in line}
        assert len(glosses) > 2500
        assert len(train & others) < 5


def test_corpus_is_train_text_alone_and_covers_every_caption() -> None:
    corpus = set(embedded.corpus())
    assert {text for sample in read_all(embedded.pairs()) for text in sample["texts"]} <= corpus
    held_out = {record.name for record in embedded.emoji() if record.split != "train"}
    assert not held_out & corpus


def read_all(source: embedded.EmbeddedSource) -> list:
    return [source.read(row, row) for row in range(len(source))]


def test_drawings_of_one_concept_and_equal_pictures_share_a_number() -> None:
    concepts = embedded.concept_numbers(embedded.emoji())
    assert all(0 <= number < 2**63 for number in concepts.values())
    by_picture = defaultdict(set)
    for record in embedded.emoji():
        by_picture[record.picture].add(concepts[record.codepoints])
    assert all(len(numbers) == 1 for numbers in by_picture.values())
    # Linked by drawings: cat face and grinning cat. Not linked, and so each other's negatives: cat and dog face.
    assert concepts["1f431"] == concepts["1f63a"] != concepts["1f436"]
    assert len(set(concepts.values())) > 0.95 * len(concepts)


def test_a_false_pair_takes_the_picture_of_one_row_and_the_caption_of_another() -> None:
    source = embedded.pairs()
    first, last = source.read(0, 0), source.read(len(source) - 1, len(source) - 1)
    mixed = source.read(0, len(source) - 1)
    assert (mixed["image"], mixed["same_image"]) == (first["image"], first["same_image"])
    assert (mixed["texts"], mixed["same_text"]) == (last["texts"], last["same_text"])
    assert first["same_image"] != last["same_text"]


def test_each_stream_gives_the_keys_it_should() -> None:
    assert set(embedded.pairs().read(3, 3)) == {"name", "image", "texts", "same_image", "same_text"}
    assert set(embedded.images().read(3, 3)) == {"name", "image", "same_image"}
    assert set(embedded.text().read(3, 3)) == {"name", "text", "same_text"}


def test_sources_pickle_as_names_alone_and_blocks_cover_every_row() -> None:
    for source in (embedded.pairs(), embedded.images("val"), embedded.text("test")):
        data = pickle.dumps(source)
        assert len(data) < 200
        assert pickle.loads(data).read(5, 7) == source.read(5, 7)
        assert [row for block in source.blocks() for row in block] == list(range(len(source)))


def test_lengths_are_those_of_the_texts() -> None:
    source = embedded.text("val")
    assert source.lengths() == [len(sample["text"]) for sample in read_all(source)]
    assert embedded.pairs().lengths() is None


def test_reading_cannot_change_what_the_next_reader_gets() -> None:
    source = embedded.pairs()
    source.read(0, 0)["texts"].clear()
    assert source.read(0, 0)["texts"]


# --------------------------------------------------------------------------------------------------- captions

keyword = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=6)


@given(name=keyword, keywords=st.lists(keyword, max_size=12))
def test_captions_are_half_names_and_use_every_keyword_in_triples(name: str, keywords: list[str]) -> None:
    texts = embedded.captions(name, keywords)
    others = {word for word in keywords if word != name}
    longer = [text.split(", ") for text in texts if text != name]
    assert texts == embedded.captions(name, keywords)
    assert all(text[0] == name and len(set(text)) == len(text) for text in longer)
    assert {word for text in longer for word in text[1:]} == others
    assert {len(text) - 1 for text in longer} <= {min(3, len(others))}
    assert texts.count(name) == max(1, len(longer))


def test_a_caption_does_not_repeat_its_name() -> None:
    assert embedded.captions("Mars", ["mars"]) == ["Mars"]


# -------------------------------------------------------------------------------------------------- attribution


def test_notice_names_every_package_with_its_version_and_holds_the_licence_texts() -> None:
    notice = (ROOT / "NOTICE").read_text()
    joined = " ".join(notice.split())
    for line in (BUILDERS / "packages.txt").read_text().splitlines()[1:]:
        _, name, version, _ = line.split()
        assert name in joined, name
        assert version in joined, (name, version)
    for sentence in (
        "copyright Twitter, Inc and other contributors",
        "copyright Google Inc",
        "copyright (c) Microsoft Corporation",
        "dedicated to the public domain",
        "Attribution 4.0 International",
        "Permission is hereby granted, free of charge, to any person obtaining a copy of this software",
        "UNICODE LICENSE V3",
        "WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved.",
    ):
        assert sentence in joined, sentence
    assert "Apache License" in (ROOT / "LICENSE").read_text()


# ------------------------------------------------------------------------------------------------- the builder


@pytest.mark.slow
def test_the_builder_makes_the_same_rows_again(tmp_path: Path) -> None:
    """Decoded rows, not bytes: another build of the WebP encoder may code the same picture otherwise."""
    for program in ("npm", "apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            pytest.skip(f"the rebuild of the embedded data needs {program}, which this machine does not have")
    libraries, packages, out = tmp_path / "libraries", tmp_path / "packages", tmp_path / "out"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", libraries]
    installed = subprocess.run([*install, "-r", BUILDERS / "requirements.txt"], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"the rebuild of the embedded data needs resvg-py and others, not installable: {installed.stderr}")
    command = [sys.executable, BUILDERS / "embedded.py", "--out", out, "--packages", packages]
    built = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(libraries)}, capture_output=True, text=True)
    if built.returncode == 3:
        pytest.skip(f"the rebuild of the embedded data could not fetch its packages: {built.stderr}")
    assert built.returncode == 0, built.stderr

    for name in TABLES:
        made, committed = pq.read_table(out / name), pq.read_table(embedded.FILES / name)
        words = [column for column in committed.column_names if column != "image"]
        assert made.select(words).equals(committed.select(words)), name
        if "image" in committed.column_names:
            for new, old in zip(made["image"].to_pylist(), committed["image"].to_pylist(), strict=True):
                assert new == old or np.abs(pixels(new) - pixels(old)).max() <= 8
    vocabulary = "bert_uncased_vocabulary.txt"
    assert (out / vocabulary).read_bytes() == (embedded.FILES / vocabulary).read_bytes()


def pixels(image: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(image)) as picture:
        return np.asarray(picture).astype(int)
