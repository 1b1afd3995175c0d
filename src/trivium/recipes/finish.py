"""What stands at the end of a run: its evaluation, results.json and report.html."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from trivium import __version__
from trivium.evaluate import report, results
from trivium.evaluate.embedded import Evaluation
from trivium.evaluate.results import Result
from trivium.recipes.prepared import Losses, Prepared
from trivium.train import run_folder
from trivium.train.config import leaves

# In a checkout; an installed package comes without.
COMPARISON = Path(__file__).parents[3] / "benchmarks" / "results" / "joint_or_contrastive.md"


def evaluate(
    prepared: Prepared, say: Callable[[str], None] = lambda _: None, final: dict[str, float] | None = None
) -> tuple[Evaluation, Losses]:
    """Measure a run on what it held out. The losses stand among the results too.

    Args:
        final: the validation losses, where they are known already.

    Returns:
        the evaluation, and for each loss (final, chance).
    """
    found, losses = prepared.held_out(say, final)
    for name, (value, guess) in losses.items():
        found.results[f"losses.{name}.final"] = Result(value)
        if guess is not None:
            found.results[f"losses.{name}.chance"] = Result(guess)
    return found, losses


def write(
    out: Path,
    found: Evaluation,
    losses: Losses,
    *,
    prepared: Prepared | None,
    run: Path | None,
    seconds: dict[str, float],
    model_path: str,
    title: str,
) -> Path:
    """results.json and report.html into a folder; returns the page's path.

    run: the folder of the run whose curves the page shows.
    """
    command = shlex.join(["trivium", *sys.argv[1:]])
    machine = run_folder.machine()
    results.write(
        out / "results.json",
        found.results,
        command=command,
        version=__version__,
        machine=machine,
        seconds=seconds,
    )
    page = out / "report.html"
    report.write(
        page,
        report.Report(
            title,
            found,
            losses,
            curves={} if run is None else report.read_curves(run / "metrics.jsonl"),
            measured={} if run is None else report.read_curves(run / "metrics.jsonl", "results"),
            monitors=[] if run is None else report.read_lines(run / "monitors.jsonl"),
            seconds=seconds,
            machine=machine,
            config={} if prepared is None else leaves(prepared.recipe),
            command=command,
            model_path=model_path,
            comparison=os.path.relpath(COMPARISON, out) if COMPARISON.is_file() and found.walls else "",
        ),
    )
    return page


def summary(found: Evaluation) -> list[str]:
    """The sentences that a terminal shows."""
    sentences = report.headline(found)
    for way in ("text_to_image", "image_to_text", "text_to_image_reranked", "image_to_text_reranked"):
        name = f"retrieval.pairs.{way}"
        if f"{name}_r10" in found.results:
            recall, median = found.results[f"{name}_r10"], found.results[f"{name}_median_rank"]
            chance, told = found.chance[f"{name}_r10"], way.replace("_reranked", ", re-ranked,").replace("_", " ")
            sentences.append(
                f"{told} on these pairs: R@10 {recall.value:.3f} (chance {chance:.3f}), median rank {median.value:g}"
            )
    return sentences + [f"not measured: {sentence}" for sentence in found.not_applicable]
