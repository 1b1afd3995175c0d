"""20,000 samples in tar shards, one in a hundred of them broken in some way: an epoch of the real loader."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import caption, tokenizer
from PIL import Image
from test_decode import encoded, gradient, png_header

from trivium.data.collate import ImageInput, PairCollate, TextInput
from trivium.data.mixture import StreamMixture
from trivium.data.order import Order
from trivium.data.shards import TarShards
from trivium.data.views import Views
from trivium.errors import TriviumError
from trivium.train.mishaps import Replaced
from trivium.train.protocol import Stream, hash64

ROWS, SHARDS, BATCH = 20_000, 20, 200
PICTURE = Image.fromarray(gradient(20, 24))
JPEG = encoded(PICTURE, "JPEG")
ROTATION = Image.Exif()
ROTATION[0x0112] = 6

# Each is (suffix and bytes of the picture, bytes of the text); None: there is none.
BROKEN: list[tuple[tuple[str, bytes] | None, bytes | None]] = [
    (("jpg", JPEG[: len(JPEG) // 2]), b"half a picture"),
    (("jpg", b""), b"zero bytes"),
    (("jpg", b"<html>404</html>"), b"another type"),
    (("png", png_header(50_000, 50_000)), b"a bomb"),
    (None, b"no picture"),
    (("jpg", JPEG), None),
    (("jpg", JPEG), b" \n"),
    (("jpg", JPEG), b"caf\xe9"),
]
ODD: list[tuple[tuple[str, bytes] | None, bytes | None]] = [
    (("jpg", encoded(PICTURE.convert("CMYK"), "JPEG")), b"CMYK"),
    (("png", encoded(Image.fromarray(np.full((9, 9), 40_000, np.uint16)), "PNG")), b"16 bits"),
    (("png", encoded(PICTURE.convert("P"), "PNG")), b"a palette"),
    (("jpg", encoded(PICTURE, "JPEG", exif=ROTATION)), b"on its side"),
    (("png", encoded(Image.new("RGB", (1, 1)), "PNG")), b"one pixel"),
    (("jpg", encoded(PICTURE.convert("L"), "JPEG")), b"grey"),
    (("webp", encoded(PICTURE, "WEBP")), b"a long text " * 50_000),
]


@pytest.fixture(scope="module")
def bad_rows() -> dict[int, int]:
    """Row -> number of what is broken: 1 % of all, exactly."""
    rows = np.random.default_rng(0).permutation(ROWS)[: ROWS // 100].tolist()
    return {row: number % len(BROKEN) for number, row in enumerate(rows)}


@pytest.fixture(scope="module")
def source(bad_rows: dict[int, int], tmp_path_factory: pytest.TempPathFactory) -> TarShards:
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        with tarfile.open(folder / f"shard-{shard:03}.tar", "w") as archive:
            for row in range(shard * ROWS // SHARDS, (shard + 1) * ROWS // SHARDS):
                picture, text = (("jpg", JPEG), caption(row).encode())
                if row in bad_rows:
                    picture, text = BROKEN[bad_rows[row]]  # type: ignore[assignment]
                elif row % 1000 < len(ODD):
                    picture, text = ODD[row % 1000]  # type: ignore[assignment]
                for suffix, data in ((picture or ("", None)), ("txt", text)):
                    if data is not None:
                        member = tarfile.TarInfo(f"{row:06}.{suffix}")
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
    return TarShards(sorted(folder.glob("*.tar")), "pairs")


def test_one_in_a_hundred_is_broken(source: TarShards, bad_rows: dict[int, int], tmp_path: Path) -> None:
    """No crash, an exact count, and every other sample where it would have been."""
    assert len(source) == ROWS
    order = Order(ROWS, source.blocks(), 3, "pairs")
    planned = order.rows(np.arange(ROWS)).tolist()
    expected_bad, expected_rows = [], []
    for place, row in enumerate(planned):
        attempt = 0
        while row in bad_rows:
            expected_bad.append(row)
            attempt += 1
            row = order.substitute(place, attempt)
        expected_rows.append(row)
    assert len(expected_bad) >= ROWS // 100
    assert sum(row != before for row, before in zip(expected_rows, planned, strict=True)) == ROWS // 100

    collate = PairCollate(ImageInput(Views(16), patch=8), TextInput(tokenizer(), 12))
    mixture = StreamMixture([Stream("pairs", source, collate, BATCH, BATCH)], seed=3)
    lenient = Replaced(tmp_path / "lenient.jsonl", rate=0.05)
    strict = Replaced(tmp_path / "strict.jsonl", rate=0.005)
    stopped = None
    same, sentences = [], []
    for number, [batch] in enumerate(mixture.loader(0, 0, 1, ROWS // BATCH), start=1):
        same.append(batch.images[0].same_B)
        sentences += batch.bad
        lenient.note(number, [batch])
        if stopped is None:
            try:
                strict.note(number, [batch])
            except TriviumError as error:
                stopped = str(error)
    assert torch.cat(same).tolist() == [hash64(source.identity(row)) >> 1 for row in expected_rows]
    named = [int(sentence.partition(" (")[2].partition(")")[0]) for sentence in sentences]
    assert named == expected_bad
    logged = [json.loads(line)["sample"] for line in (tmp_path / "lenient.jsonl").read_text().splitlines()]
    assert logged == sentences
    assert stopped is not None
    assert "samples were bad (more than 0.5% of 10000)" in stopped
    whys = {sentence.partition("): ")[2][:24] for sentence in sentences}
    assert len(whys) >= len(BROKEN)
