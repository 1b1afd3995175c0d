"""One self-contained HTML page of what a model learned: no network, no other file, readable on a phone and on paper."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jinja2

from trivium.evaluate import charts
from trivium.evaluate.embedded import Evaluation
from trivium.evaluate.results import Result
from trivium.manifest import write_whole

LOSS_TITLES = {
    "contrastive": ("Contrastive", "find a picture's own words among those of the whole batch, and the reverse"),
    "crops": (
        "Self-distillation (DINO)",
        "say of one part of a picture what an average of past models says of another",
    ),
    "koleo": ("Spread (KoLeo)", "keep every picture away from its nearest neighbour"),
    "ibot": (
        "Hidden patches (iBOT)",
        "say of a hidden patch what an average of past models, which sees it, says of it",
    ),
    "likelihood": (
        "Pixels (likelihood)",
        "draw a picture from its codes: minus the logarithm of a density, so it may fall below 0",
    ),
    "kl": ("Codes (KL)", "say of each patch what it is, held near an even use of all codes: 0 says nothing"),
    "itm": ("Matching (ITM)", "say whether a picture and a text belong together"),
    "mim": ("Masked picture (MIM)", "guess hidden patches of a picture from the patches around"),
    "mlm": ("Masked text (MLM)", "guess hidden words of a text from the words around"),
    "mmm_image": ("Masked picture, with text (MMM)", "guess hidden patches from the rest and the caption"),
    "mmm_text": ("Masked text, with picture (MMM)", "guess hidden words of a caption from the rest and the picture"),
}
PARTS_OF_DETECTION = {  # of a loss named TASK.PART
    "class": "say of each query what it found, or that it found nothing",
    "box": "put each box where the object is: the distance of its four numbers",
    "giou": "cover the object with the box and nothing else",
    "attributes": "name what an object is like",
}
RETRIEVAL_TITLES = {
    "style": "Known things, unseen style",
    "concepts": "Things never seen",
    "pairs": "Captioned pictures",
}
READING_TITLES = {  # what a search uses first, where the model has it
    "projected": "projected (space shared with text)",
    "class_token": "class token",
    "mean_of_patches": "mean of patches",
    "pixels": "16 × 16 pixels, no model",
}
CLASSIFIERS = {
    "zero_shot": ("Zero-shot", "the nearest class name, read as text; no labelled picture used"),
    "knn": ("Nearest neighbours", "the 20 most similar training drawings vote"),
    "knn.other_concepts": ("The same, own concept left out", "the same thing in another style may not vote"),
    "knn.pixels.other_concepts": ("The same, from 16 × 16 pixels", "no network: what any must beat"),
    "knn.random_start.other_concepts": ("The same, before training", "the network as it was drawn at random"),
    "probe": ("Linear probe", "a linear classifier trained on frozen features"),
}
MEASURED_TITLES = {  # in the midst of a run, and what is to be beaten
    "knn.group": ("Group", "knn.pixels.group"),
    "knn.subgroup": ("Subgroup", "knn.pixels.subgroup"),
    "knn.other_concepts.group": ("Group, own concept left out", "knn.pixels.other_concepts.group"),
    "knn.other_concepts.subgroup": ("Subgroup, own concept left out", "knn.pixels.other_concepts.subgroup"),
}
MONITOR_TITLES = {  # what the figure is, and on which side of its threshold a monitor speaks
    "collapse": ("Effective rank of features", "below"),
    "health": ("Figure that the method watches", "beyond"),
    "saturation": ("Learned number with a range", "at"),
    "balance": ("Share of the gradient", "above"),
    "chance": ("Loss as a share of its chance", "above"),
    "duplicates": ("Repeated rows in a batch", "above"),
    "skipped": ("Steps that were skipped", "above"),
    "loading": ("Time spent waiting for data", "above"),
    "mfu": ("Use of the GPU (MFU)", "below"),
}


# What a model is for: finding pictures by words, finding them by pictures, vectors of texts, answers of a fine-tuned
# head or to questions about a picture, boxes, codes of an image tokenizer.
Use = Literal["words", "pictures", "texts", "answers", "questions", "boxes", "codes"]


@dataclass
class Report:
    """All that a page shows. What is empty has no section."""

    title: str
    evaluation: Evaluation
    losses: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)  # name -> (final, chance)
    curves: Mapping[str, charts.Curve] = field(default_factory=dict)  # name -> (step, training loss)
    seconds: Mapping[str, float] = field(default_factory=dict)  # "train", "total" and other parts of the command
    machine: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)  # leaves by their dotted path
    command: str = ""
    model_path: str = "RUN"  # how the commands under "Use it" name the model
    use: Use = "words"  # which commands these are
    call: str = ""  # of `bundle.answer`, of a fine-tuned head
    note: str = ""  # a sentence under the headline
    comparison: str = ""  # address of a page that sets joint training beside the contrastive loss alone
    monitors: Sequence[Mapping[str, Any]] = ()  # lines of monitors.jsonl
    measured: Mapping[str, charts.Curve] = field(default_factory=dict)  # name -> (step, figure), while it trained


def read_curves(metrics: Path, kind: Literal["losses", "results"] = "losses") -> dict[str, list[tuple[float, float]]]:
    """Training losses of a run's metrics.jsonl, or the figures that were measured in its midst and at its end: name ->
    [(step, number)]."""
    curves: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for entry in read_lines(metrics):
        try:
            found = {name: number for name, number in entry.get(kind, {}).items() if not isinstance(number, dict)}
            points = [(name, (float(entry["step"]), float(x))) for name, x in found.items() if x is not None]
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        for name, point in points:
            curves[name].append(point)
    return dict(curves)


def read_lines(path: Path) -> list[Any]:
    """The JSON values of a run's log, one a line. A line that was cut off or damaged is left out; a file that is not
    there has none."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def write(path: Path, report: Report) -> None:
    """Write the page whole or not at all. Raises TriviumError where the folder cannot be written to."""
    write_whole(path, render(report))


def environment() -> jinja2.Environment:
    """The templates of this folder, with the filters that they use."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"percent": percent, "clock": clock, "webp": lambda data: charts.uri("image/webp", data)}
    return found


def render(report: Report) -> str:
    """The page as a string."""
    evaluation = report.evaluation
    template = environment().get_template("report.html")
    return template.render(
        report=report,
        evaluation=evaluation,
        headline=headline(evaluation),
        losses=_losses(report),
        measured=_measured(report),
        monitors=_monitors(report),
        retrieval=_retrieval(evaluation),
        readings=_readings(evaluation),
        classification=_classification(evaluation),
        matching=[evaluation.results.get("itm.accuracy"), evaluation.results.get("itm.auroc")],
        reconstructions=[
            {
                "name": sample.name,
                "right": sample.right,
                "num_masked": sample.num_masked,
                "pictures": [
                    (charts.png_uri(picture), label)
                    for picture, label in (
                        (sample.original, "original"),
                        (sample.masked, "what the model sees"),
                        (sample.from_picture, "its guess"),
                        (sample.with_name, "its guess, told the name"),
                        (sample.true_codes, "the true codes"),
                    )
                ],
            }
            for sample in evaluation.reconstructions
        ],
    )


def headline(evaluation: Evaluation) -> list[str]:
    """What the model can do, in a few sentences with numbers."""
    results = evaluation.results
    sentences = [*(f"{sentence}." for sentence in evaluation.notes), *evaluation.headline]
    name = "retrieval.style.text_to_image_r10"
    if name in results:
        value, chance = results[name].value, evaluation.chance[name]
        sentences.append(
            f"Given the name of a thing, this model puts the right drawing among its first ten of 1,678, in a style"
            f" that it never saw, {percent(value)} of the time: {_times(value, chance)} a blind guess"
            f" ({percent(chance)})."
        )
    name = "retrieval.pairs.text_to_image_r10"
    if name in results:
        value, chance = results[name].value, evaluation.chance[name]
        sentences.append(
            f"Given a caption, this model puts the right picture among its first ten {percent(value)} of the time:"
            f" {_times(value, chance)} a blind guess ({percent(chance)})."
        )
    if "retrieval.concepts.text_to_image_r10" in results:
        value = results["retrieval.concepts.text_to_image_r10"].value
        sentences.append(f"For things that it never saw in any style it is {percent(value)}.")
    if "knn.group" in results:
        sentence = f"It sorts unseen drawings into nine groups with {percent(results['knn.group'].value)} right"
        if "itm.auroc" in results:
            sentence += (
                f", and ranks a true pair of picture and name above a false one"
                f" {percent(results['itm.auroc'].value)} of the time"
            )
        sentences.append(f"{sentence}.")
    return sentences


def percent(share: float | None) -> str:
    if share is None or not math.isfinite(share):
        return "–"
    return f"{100 * share:.2f}\N{NO-BREAK SPACE}%" if 0 < share < 0.001 else f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _times(value: float, chance: float) -> str:
    ratio = value / chance
    return f"{ratio:.0f} times" if ratio >= 3 else f"{ratio:.1f} times"


def loss_title(name: str) -> tuple[str, str]:
    """How people read the name of a loss, and what is asked for; that is empty for a loss named after its task."""
    task, _, part = name.rpartition(".")
    if name in LOSS_TITLES:
        return LOSS_TITLES[name]
    return (f"{task}: {part}", PARTS_OF_DETECTION[part]) if part in PARTS_OF_DETECTION else (name, "")


def _losses(report: Report) -> list[dict[str, Any]]:
    found = []
    for name in dict.fromkeys([*LOSS_TITLES, *report.losses, *report.curves]):
        title, meaning = loss_title(name)
        final, chance = report.losses.get(name, (None, None))
        curve = report.curves.get(name, [])
        if final is None and not curve:
            continue
        # A density may be above 1, and its loss below 0: then no share of chance means anything.
        below = None if final is None or chance is None or min(final, chance) <= 0 else 1 - final / chance
        found.append(
            {
                "title": title,
                "meaning": meaning,
                "final": final,
                "chance": chance,
                "below": below,
                "chart": charts.loss_curve(title, curve, chance, final) if curve else None,
            }
        )
    return found


def _measured(report: Report) -> list[dict[str, Any]]:
    """A chart for each figure that was measured more than once."""
    found = []
    for name, (title, floor) in MEASURED_TITLES.items():
        curve = report.measured.get(name, [])
        if len(curve) < 2:
            continue
        beaten = report.evaluation.results.get(floor)
        chart = charts.share_curve(title, curve, None if beaten is None else beaten.value)
        told = "; ".join(f"step {step:,.0f}: {percent(share)}" for step, share in curve)
        found.append({"title": title, "chart": chart, "told": told, "last": curve[-1][1], "floor": beaten})
    return found


def _monitors(report: Report) -> list[dict[str, Any]]:
    """The last figure of each monitor, and the last sentence of those that spoke."""
    last: dict[tuple[str, str, str], dict[str, Any]] = {}
    for line in report.monitors:
        about = (line["monitor"], line["subject"], line["stream"])
        said = {"said_at": line["step"]} if "sentence" in line else {}
        last[about] = {**last.get(about, {}), **line, **said}
    found = []
    for name, (title, side) in MONITOR_TITLES.items():
        found += [{**line, "title": title, "side": side} for (monitor, *_), line in last.items() if monitor == name]
    return found


def _retrieval(evaluation: Evaluation) -> list[dict[str, Any]]:
    rows = []
    ways = (("text_to_image", "text → picture"), ("image_to_text", "picture → text"))
    orders = (("", ""), ("_reranked", ", re-ranked by matching"))  # the second of models that match
    for protocol, title in RETRIEVAL_TITLES.items():
        for (direction, way), (order, how) in itertools.product(ways, orders):
            prefix, asked = f"retrieval.{protocol}.{direction}{order}", f"{way}{how}"
            if f"{prefix}_r1" not in evaluation.results:
                continue
            recalls = [evaluation.results[f"{prefix}_r{cutoff}"] for cutoff in (1, 5, 10)]
            rows.append(
                {
                    "title": title,
                    "asked": asked,
                    "recalls": recalls,
                    "median_rank": evaluation.results[f"{prefix}_median_rank"],
                    "chance": evaluation.chance[f"{prefix}_r10"],
                }
            )
    return rows


def _readings(evaluation: Evaluation) -> dict[str, Any] | None:
    prefix = "retrieval.style.image_to_image"
    found = {name: evaluation.results.get(f"{prefix}.{name}_r1") for name in READING_TITLES}
    values = {name: result for name, result in found.items() if result is not None}
    if not values:
        return None
    best = max((name for name in values if name != "pixels"), key=lambda name: values[name].value)
    rows = {READING_TITLES[name]: (r.value, r.low, r.high) for name, r in values.items()}
    return {
        "chart": charts.bars(rows, marked=next(title for name, title in READING_TITLES.items() if name in values)),
        "alt": "; ".join(f"{title}: {percent(value)}" for title, (value, _, _) in rows.items()),
        "best": READING_TITLES[best],
        "n": values[best].n,
        "beats_pixels": "pixels" in values and values[best].value > values["pixels"].value,
    }


def _classification(evaluation: Evaluation) -> list[dict[str, Any]]:
    def entry(name: str) -> tuple[Result, float]:
        return evaluation.results[name], evaluation.chance[name]

    return [
        {
            "title": title,
            "meaning": meaning,
            "group": entry(f"{prefix}.group"),
            "subgroup": entry(f"{prefix}.subgroup"),
        }
        for prefix, (title, meaning) in CLASSIFIERS.items()
        if f"{prefix}.group" in evaluation.results
    ]
