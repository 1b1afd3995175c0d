"""Charts of a report: matplotlib figures as SVG inside data URIs, so that a page needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

INK, QUIET, LINE, ACCENT = "#22303c", "#7b8794", "#e4e7eb", "#1f7a8c"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.hashsalt": "trivium",  # the same chart gives the same bytes
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
}
COMPARED = (ACCENT, "#c2571a")  # of two runs, the first and the second
SMOOTHED = 30  # points of a curve that are left after averaging neighbours

Curve = Sequence[tuple[float, float]]  # (step, loss), by step


def png_uri(picture_HWC: np.ndarray) -> str:
    """uint8 [H, W, 3] as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(picture_HWC).save(buffer, "PNG", optimize=True)
    return uri("image/png", buffer.getvalue())


def webp_uri(picture_HWC: np.ndarray, side: int) -> str:
    """The same as a thumbnail, at most `side` pixels on the longer side."""
    picture = Image.fromarray(picture_HWC)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80)
    return uri("image/webp", buffer.getvalue())


def uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def loss_curve(title: str, curve: Curve, chance: float | None, final: float | None) -> str:
    """One small chart: training loss over steps (log scale), chance dashed, the held-out loss at the end as a dot."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.1, 2.1), layout="constrained")
        axes = figure.subplots()
        points = _plot(axes, curve, ACCENT)
        if chance is not None:
            axes.axhline(chance, color=QUIET, linestyle=(0, (4, 3)), linewidth=1)
            axes.annotate(
                "chance", (1, chance), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
                ha="right", fontsize=8, color=QUIET,
            )  # fmt: skip
        if final is not None and np.isfinite(final) and len(points):
            axes.plot(points[-1, 0], final, "o", color=INK, markersize=4, clip_on=False)
        _limits(axes, points, [value for value in (chance, final) if value is not None])
        return _curves_svg(figure, axes, title)


def compared_curves(title: str, curves: Sequence[Curve]) -> str:
    """One small chart: the same training loss of two runs over steps (log scale), in the colours of COMPARED."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.1, 2.1), layout="constrained")
        axes = figure.subplots()
        points = [_plot(axes, curve, colour) for curve, colour in zip(curves, COMPARED, strict=True)]
        _limits(axes, np.concatenate(points), [])
        return _curves_svg(figure, axes, title)


def share_curve(title: str, curve: Curve, floor: float | None) -> str:
    """One small chart: a share, in per cent, as it was measured at some steps; a floor dashed."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.1, 2.1), layout="constrained")
        axes = figure.subplots()
        steps, shares = np.asarray(curve, dtype=float).reshape(-1, 2).T
        axes.plot(steps, 100 * shares, "o-", color=ACCENT, markersize=4, linewidth=1.8, clip_on=False)
        if floor is not None:
            axes.axhline(100 * floor, color=QUIET, linestyle=(0, (4, 3)), linewidth=1)
        axes.set_xlim(left=0)
        axes.margins(y=0.15)
        axes.set_ylabel("%")
        return _curves_svg(figure, axes, title)


def bars(rows: Mapping[str, tuple[float, float | None, float | None]], marked: str | None = None) -> str:
    """Horizontal bars of shares, each (value, low, high) with its interval as a whisker; `marked` in the accent."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.2, 0.36 * len(rows) + 0.5), layout="constrained")
        axes = figure.subplots()
        for place, (name, (value, low, high)) in enumerate(rows.items()):
            axes.barh(place, 100 * value, color=ACCENT if name == marked else "#b8c4ce", height=0.62)
            end = 100 * value
            if low is not None and high is not None:
                axes.plot([100 * low, 100 * high], [place, place], color=INK, linewidth=1)
                end = 100 * high
            axes.annotate(f"{100 * value:.1f} %", (end, place), xytext=(5, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(rows)), list(rows), color=INK)
        axes.invert_yaxis()
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0, labelbottom=False)
        axes.margins(x=0.12)
        return _svg(figure)


def histogram(title: str, counts: Mapping[int, int], limit: int) -> str:
    """How often each whole number occurs, those above `limit` in the accent; the last bar holds all from there on."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6, 2.1), layout="constrained")
        axes = figure.subplots()
        values, weights = np.array(list(counts)), np.array(list(counts.values()))
        last = max(2 * limit, 8)
        edges = np.arange(0, last + 2, max(1, -(-last // 64)))
        heights, _ = np.histogram(values.clip(max=int(edges[-1]) - 1), edges, weights=weights)
        colours = [ACCENT if edge > limit else "#b8c4ce" for edge in edges[:-1]]
        axes.bar(edges[:-1], heights, width=np.diff(edges), align="edge", color=colours)
        axes.axvline(limit + 1, color=QUIET, linestyle=(0, (4, 3)), linewidth=1)
        axes.set_title(title)
        axes.set_xlabel("tokens")
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        return _svg(figure)


def frequencies(counts: Sequence[int]) -> str:
    """How often each of many things occurs, the most frequent first; both axes logarithmic."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.2, 2.1), layout="constrained")
        axes = figure.subplots()
        used = [count for count in counts if count]
        axes.fill_between(np.arange(1, len(used) + 1), used, color=ACCENT, alpha=0.25, linewidth=0)
        axes.plot(np.arange(1, len(used) + 1), used, color=ACCENT, linewidth=1.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(1, max(2, len(counts)))
        axes.set_xlabel("rank")
        axes.set_ylabel("uses")
        return _svg(figure)


def _plot(axes: Axes, curve: Curve, colour: str) -> np.ndarray:
    """Draw one curve, as it is and smoothed; returns its finite points, [N, 2]."""
    points = np.asarray([point for point in curve if np.isfinite(point[1])], dtype=float).reshape(-1, 2)
    if len(points):
        axes.plot(points[:, 0], points[:, 1], color=colour, alpha=0.25, linewidth=0.8)
        smooth = _smoothed(points)
        axes.plot(smooth[:, 0], smooth[:, 1], color=colour, linewidth=1.8)
        axes.set_xscale("log")
    return points


def _curves_svg(figure: Figure, axes: Axes, title: str) -> str:
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    return _svg(figure)


def _smoothed(points: np.ndarray) -> np.ndarray:
    """Means of neighbours, in bins of equal width on the log axis."""
    if len(points) <= SMOOTHED:
        return points
    edges = np.geomspace(max(points[0, 0], 1), points[-1, 0] + 1, SMOOTHED + 1)
    bins = np.digitize(points[:, 0], edges)
    return np.array([points[bins == number].mean(axis=0) for number in np.unique(bins)])


def _limits(axes: Axes, points: np.ndarray, others: list[float]) -> None:
    """The first steps of a run can stand far above the rest: they may leave the picture, chance may not."""
    values = [value for value in others if np.isfinite(value)]
    if len(points):
        values += [float(points[:, 1].min()), float(np.quantile(points[:, 1], 0.98))]
    if values:
        room = 0.08 * (max(values) - min(values) or 1)
        axes.set_ylim(min(values) - room, max(values) + room)


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return uri("image/svg+xml", buffer.getvalue())
