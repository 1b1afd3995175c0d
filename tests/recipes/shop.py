"""A small shop: drawings made on the spot with captions in a CSV and a JSONL, and a FLAVA that trains in a second."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from PIL import Image, ImageDraw

from trivium.cli import main

COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("circle", "square", "triangle", "bar")
THINGS = [(colour, shape) for colour in COLOURS for shape in SHAPES]

# As command-line words; fits every test here: 6 steps take half a second.
TINY = {
    "model.width": 32, "model.mlp-width": 64, "model.num-heads": 2, "model.projection-width": 16,
    "model.image-layers": 1, "model.text-layers": 1, "model.multimodal-layers": 1,
    "model.image-size": 32, "model.patch-size": 8, "model.num-codes": 16,
    "data.batch": 8, "data.schedule": "round-robin", "objectives.masked-share": 1.0,
    "train.workers": 0, "train.precision": "fp32", "train.threads": 1, "train.log-every": 1, "train.steps": 6,
}  # fmt: skip
LOSSES = ("mim", "mlm", "mmm_image", "mmm_text", "itm", "contrastive")


def drawing(colour: str, shape: str, side: int = 40) -> Image.Image:
    picture = Image.new("RGB", (side, side), "white")
    pen, box = ImageDraw.Draw(picture), (8, 8, side - 8, side - 8)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(8, side - 8), (side - 8, side - 8), (side // 2, 8)], fill=colour)
    else:
        pen.rectangle((8, side // 2 - 4, side - 8, side // 2 + 4), fill=colour)
    return picture


def make_shop(folder: Path) -> Path:
    """pictures/, half of them captioned in goods.csv, the others in goods.jsonl, and lines.txt of words alone."""
    (folder / "pictures").mkdir(parents=True)
    for colour, shape in THINGS:
        drawing(colour, shape).save(folder / "pictures" / f"{colour}-{shape}.png")
    with (folder / "goods.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        writer.writerows([f"pictures/{colour}-{shape}.png", f"a {colour} {shape}"] for colour, shape in THINGS[::2])
    lines = [
        json.dumps({"image": f"pictures/{c}-{s}.png", "caption": [f"a {c} {s}", f"one {s}, {c}"]})
        for c, s in THINGS[1::2]
    ]
    (folder / "goods.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sentences = [f"the {shape} is {colour} and lies on white" for colour, shape in THINGS]
    (folder / "lines.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    return folder


def data_of(shop: Path) -> list[str]:
    """The three kinds of data as flags."""
    return [
        *("--data.pairs", str(shop / "goods.csv"), str(shop / "goods.jsonl")),
        *("--data.images", str(shop / "pictures"), "--data.text", str(shop / "lines.txt")),
    ]


def flags(**changes: object) -> list[str]:
    """TINY as flags, with `changes` under their names (train__steps for train.steps)."""
    named = {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return [word for name, value in {**TINY, **named}.items() for word in (f"--{name}", str(value))]


def trivium(*words: object) -> int:
    """The command line in this process: its exit code."""
    return main([str(word) for word in words])


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def digests(checkpoint: Path) -> dict[str, str]:
    """sha256 of each file of a checkpoint; of all but state.json, which holds seconds and a command."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name != "training/state.json"}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
