"""`trivium data codes`: what the image tokenizer says about each picture, computed once and kept."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trivium.cli.embed import ERRORS_SHOWN, check_can_write
from trivium.cli.overrides import set_overrides
from trivium.errors import TriviumError

if TYPE_CHECKING:
    from torch import Tensor


def data(
    action: Literal["codes"],
    recipe: str,
    *,
    out: Path,
    size: str | None = None,
    crops: int = 4,
    overrides: Mapping[str, Any] | None = None,
) -> None:
    """Cache the image tokenizer's codes of every picture of a run, so that training never runs the tokenizer.

    Give the recipe, --size and the same fields as to pretrain, since they decide what the tokenizer sees:

      trivium data codes flava --size base --data.pairs a.csv --data.image-tokenizer dalle.pt --out codes

      trivium pretrain flava --size base --data.pairs a.csv --data.image-tokenizer dalle.pt --data.codes codes

    Training then chooses among the cached crops of a picture instead of drawing new ones. Run it again to go on after
    an interruption.

    Args:
        action: codes.
        recipe: "flava", or a function of your own: my_run.py:shop.
        out: the file to write, .safetensors.
        size: the recipe's one dial, such as tiny, small or base.
        crops: of each picture, beside the whole picture, which validation sees.
        overrides: leaves by their dotted path, such as {"data.pairs": ["a.csv"]}.
    """
    assert action == "codes"
    check_can_write(out)
    if crops < 1:
        raise TriviumError(f"--crops {crops}: training needs at least 1 crop of each picture")
    from trivium.data.codes import CodeCache, build
    from trivium.load import image_tokenizer_hash
    from trivium.recipes import RECIPES
    from trivium.recipes.flava import FlavaRecipe
    from trivium.train import config
    from trivium.train.precision import choose_device

    tree = config.build(config.Config(recipe, {} if size is None else {"size": size}, {}), RECIPES)
    tree = set_overrides(tree, overrides or {})
    if not isinstance(tree, FlavaRecipe):
        raise TriviumError(f"the recipe {recipe} uses no image tokenizer, so there are no codes to cache")
    pictures, views, tokenizer = tree.pictures()
    name = image_tokenizer_hash(tokenizer)
    device = choose_device(tree.train.device)
    tokenizer.to(device)

    def encode(pixels_BCHW: Tensor) -> Tensor:
        return tokenizer.encode(pixels_BCHW.to(device).float() / 255)

    given = tree.data
    described = f"{given.pairs} {given.images} {given.validation} {given.image_column}"
    with _progress("codes") as progress:
        skipped = build(pictures, views, encode, name, out, crops, source_name=described, progress=progress)
    skipped = list(dict.fromkeys(skipped))  # the same file may serve two streams
    for sentence in skipped[:ERRORS_SHOWN]:
        print(f"  {sentence}", file=sys.stderr)
    if len(skipped) > ERRORS_SHOWN:
        print(f"  and {len(skipped) - ERRORS_SHOWN} more", file=sys.stderr)
    bad = f"; {len(skipped)} could not be read and are left out" if skipped else ""
    print(f"codes of {len(CodeCache(out, views, name))} pictures, {crops} crops each, in {out}{bad}")
    print(f"train with the same fields and --data.codes {out}")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal, nothing where stderr is a file."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
