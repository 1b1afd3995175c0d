"""`trivium data scenes`: pictures composed of drawings, written as the published data sets are."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from trivium.cli.data import progress_bar


def scenes(
    *,
    out: Path,
    split: Literal["train", "new-scenes", "held-out-concepts", "held-out-style", "held-out-both"] = "train",
    count: int = 10_000,
    seed: int = 0,
    format: Literal["coco", "vg", "vqa", "snli-ve", "nlvr2", "refcoco", "all"] = "all",
    difficulty: float = 0.5,
    classes: Literal["group", "subgroup"] = "group",
) -> None:
    """Write scenes: the embedded drawings on backgrounds of 128 x 128 pixels, with exact boxes and masks.

      trivium data scenes --out scenes --count 20000

      trivium data scenes --out scenes --count 2000 --split new-scenes

    Each format gets a folder inside --out, laid out as its owners publish it: train as their training half, every other
    split as their validation half. Run it again to go on after an interruption; the same command always writes the same
    files.

    Args:
        out: the folder to write into.
        split: whose drawings: those trained on; the same in other scenes; concepts, a style (Noto), or both that
            training never sees.
        count: scenes.
        seed: another one gives other scenes.
        format: coco (boxes, masks, captions), vg (boxes, attributes, regions, questions), vqa (VQAv2), snli-ve, nlvr2
            (statements on two pictures), refcoco (referring expressions), or all.
        difficulty: 0 to 1: number and size of the objects, how much of them is hidden, contrast of the background.
        classes: the 9 groups of emoji, or 24 subgroups, which is harder.
    """
    from trivium.data.scene_files import write_scenes
    from trivium.data.scene_formats import FORMATS
    from trivium.data.scenes import Scenes

    made = Scenes(split, count, seed, difficulty, classes)
    with progress_bar("scenes") as progress:
        written = write_scenes(made, out, tuple(FORMATS) if format == "all" else (format,), progress)
    for name, each in written.items():
        rows = ", ".join(f"{number:,} {kind}" for kind, number in each.annotations.items())
        were_there = "" if each.made == count else f" ({count - each.made:,} scenes were there)"
        print(f"{name}: {count:,} scenes of {split}, {rows}, in {each.folder}{were_there}")
