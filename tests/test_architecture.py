"""The arrows between the rooms, read from the imports alone (docs/architecture.md)."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "trivium"
FILES = sorted(str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py"))
EVERYWHERE = "errors manifest tensor_files __version__"
ROOMS = {  # what a room may import beside itself and EVERYWHERE
    "layers": "", "models": "layers", "objectives": "", "methods": "models objectives layers train.protocol",
    "data": "train.protocol", "train": "", "convert": "models", "bundle": "models data.tokenizer data.transforms",
    "hub": "", "load": "bundle hub models convert data.tokenizer data.transforms",
    "evaluate": "bundle load models.encoded models.grounding models.image_tokenizer data train.protocol",
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
