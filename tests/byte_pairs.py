"""A vocabulary of byte pairs in CLIP's manner, small enough to read."""

from __future__ import annotations

import gzip
from pathlib import Path

MERGES = "i n,t h,a n,r e,o n,e r,o r,a n</w>,th e</w>,d o,do g</w>,i n</w>,in g</w>,' s</w>"
PAIRS = [(left, right) for left, right in (merge.split() for merge in MERGES.split(","))]


def openai_file(folder: Path, name: str = "bpe.txt", merges: list[tuple[str, str]] = PAIRS) -> Path:
    text = "\n".join(['"bpe.txt#version: 0.2', *(f"{left} {right}" for left, right in merges)]) + "\n"
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path
