"""docs/architecture.md beside the files: the arrows between the rooms, read from the imports alone, and their names."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "trivium"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FILES = sorted(str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py"))
EVERYWHERE = "errors manifest locks tensor_files __version__"
ROOMS = {  # what a room may import beside itself and EVERYWHERE
    "layers": "", "models": "layers", "objectives": "", "methods": "models objectives layers train.protocol",
    "data": "train.protocol", "train": "", "convert": "models", "bundle": "models data.tokenizer data.transforms",
    "hub": "", "load": "bundle hub models convert data.tokenizer data.transforms",
    "evaluate": "bundle load models.encoded models.grounding models.image_tokenizer objectives.contrastive data"
                " train.protocol",
    "explain": "bundle data",
    "recipes": "methods models data train evaluate bundle load hub",
}  # fmt: skip
NUMERIC = {"torch", "numpy", "scipy", "safetensors", "trivium"}
ONLY_IN = {
    "tyro": "cli/",
    "simplejpeg": "data/decode.py",
    "tensorboard": "train/logs.py",
    "fsspec": "data/remote.py",
    "huggingface_hub": "hub.py",
    "aiohttp": "data/remote.py",
}


def imports(file: str) -> list[str]:
    nodes = list(ast.walk(ast.parse((SOURCE / file).read_text())))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return plain + [f"{n.module}.{alias.name}" for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names]


@pytest.mark.parametrize("file", FILES)
def test_every_import_follows_the_arrows(file: str) -> None:
    room = file.split("/")[0].removesuffix(".py")
    assert Path(file).stem not in {"utils", "helpers", "common", "misc"}, f"{file}: say what is in it"
    for name in imports(file):
        top, inner = name.split(".")[0], name.removeprefix("trivium.")
        if top == "trivium" and room in ROOMS:
            allowed = f"{room} {EVERYWHERE} {ROOMS[room]}".split()
            assert any(f"{inner}.".startswith(f"{each}.") for each in allowed), f"{file} imports {name}"
        assert file.startswith(ONLY_IN.get(top, "")), f"{file} imports {name}"
        if room in {"layers", "models", "objectives", "methods", "train"} and file != "train/logs.py":
            assert top in {*NUMERIC, *sys.stdlib_module_names}, f"{file} imports {name}"


def named_in_rooms() -> dict[str, set[str]]:
    """What stands at the head of each entry of "The rooms", such as "data/" -> the words that follow it."""
    found: dict[str, set[str]] = {}
    head = ""
    for line in PAGE.partition("## The rooms")[2].partition("*Method* is")[0].splitlines():
        if line.startswith(" ") and len(line) - len(line.lstrip()) < 20:
            head, line = line.split()[0], line.partition(line.split()[0])[2]
        found.setdefault(head, set()).update(re.findall(r"\w+", line))
    return found


def test_every_file_is_named_under_its_room() -> None:
    named = named_in_rooms()
    for folder in (SOURCE, ROOT / "benchmarks", ROOT / "builders"):
        for path in sorted(folder.rglob("*.py")):
            if path.name == "__init__.py":
                continue
            if path.parent == SOURCE:
                assert path.name in named, f"{path.name} is in no room"
            else:
                assert path.stem in named[f"{path.parent.name}/"], f"{path.relative_to(ROOT)} is not named"


def test_every_file_that_is_named_is_there() -> None:
    files = [f"/{path.relative_to(ROOT)}" for top in ("src", "tests", "benchmarks", "builders")
             for path in (ROOT / top).rglob("*.py")]  # fmt: skip
    for name in re.findall(r"`([\w/.-]+\.py)`", PAGE):
        assert any(file.endswith(f"/{name}") for file in files), f"there is no {name}"
    for name in re.findall(r"`(tests/[\w/]+/)`", PAGE):
        assert (ROOT / name).is_dir(), f"there is no {name}"
