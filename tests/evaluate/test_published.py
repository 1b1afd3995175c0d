"""The published columns give the averages that the papers print, errata as the corrected rows have them."""

from __future__ import annotations

import csv
import re

import pytest

from trivium.evaluate import published
from trivium.evaluate.paper_tasks import SUITES, VISION
from trivium.evaluate.published import Column, averages, columns

FLAVA = SUITES["flava35"]
TABLE_4 = [
    ("FLAVA", "MIM only, PMD images (col 1)", (None, 57.46, None), 19.15),
    ("FLAVA", "MLM only, PMD text (col 2)", (71.55, None, None), 23.85),
    ("FLAVA", "FLAVA_C, contrastive only, PMD (col 3)", (64.80, 79.14, 66.25), 70.06),
    ("FLAVA", "FLAVA_MM, PMD (col 4)", (74.22, 79.35, 69.11), 74.23),
    ("FLAVA", "FLAVA without unimodal init (col 5)", (75.55, 78.29, 67.32), 73.72),
    ("FLAVA", "FLAVA full (col 6)", (78.19, 79.44, 69.92), 75.85),
    ("CLIP", "ViT-B/16 trained on PMD (col 7)", (46.44, 76.12, 62.02), 61.53),
    ("CLIP", "ViT-B/16, released 400M model (col 8)", (50.51, 82.57, 67.29), 66.79),
]  # fmt: skip


def column(suite: str, system: str, setting: str) -> Column:
    return next(c for c in columns(SUITES[suite]) if (c.system, c.setting) == (system, setting))


@pytest.mark.parametrize(("system", "setting", "domains", "macro"), TABLE_4)
def test_averages_of_table_4(system: str, setting: str, domains: tuple[float | None, ...], macro: float) -> None:
    cells = column("flava35", system, setting).cells
    found = averages(FLAVA, {place: cell.value for place, cell in cells.items()})
    for value, printed in zip(found.domains.values(), domains, strict=True):
        assert value == (None if printed is None else pytest.approx(printed, abs=0.0051))
    assert found.macro == pytest.approx(macro, abs=0.0051)


def test_a_domain_that_is_half_there_has_no_average_and_leaves_no_macro() -> None:
    cells = column("flava35", "FLAVA", "FLAVA full (col 6)").cells
    values = {place: cell.value for place, cell in cells.items() if place[0] != "MNIST (linear probe)"}
    found = averages(FLAVA, values)
    assert found.domains["vision"] is None and found.macro is None
    assert found.domains["language"] == pytest.approx(78.19, abs=0.0051)
    assert averages(FLAVA, {}).macro is None


def test_a_domain_that_the_model_cannot_do_counts_zero_and_one_that_was_not_run_does_not() -> None:
    cells = column("flava35", "FLAVA", "MIM only, PMD images (col 1)").cells
    values = {place: cell.value for place, cell in cells.items()}
    assert averages(FLAVA, values, cannot=["language", "multimodal"]).macro == pytest.approx(19.15, abs=0.0051)
    assert averages(FLAVA, values, cannot=["language"]).macro is None
    assert averages(FLAVA, values, cannot=[]).macro is None  # it can do them all, and two were not run


def test_corrected_rows_are_preferred_and_say_why() -> None:
    cell = column("flava35", "FLAVA", "FLAVA without unimodal init (col 5)").cells["QQP (fine-tune)", 0]
    assert cell.value == 88.60 and cell.confidence == "corrected" and "98.61" in cell.note
    lxmert = column("flava35", "LXMERT", "Table 5 row 8").cells
    assert lxmert["QQP (fine-tune)", 0].value == pytest.approx((89.0 + 85.4) / 2)
    clip = column("flava35", "CLIP", "ViT-B/16, released 400M model (Table 5 row 2)").cells
    assert clip["MRPC (fine-tune)", 0].value == pytest.approx(69.95)


def test_table_5_is_whole() -> None:
    rows = {c.setting: c for c in columns(FLAVA) if "Table 5" in c.source or "Table 5 row" in c.setting}
    systems = {c.system for c in rows.values()}
    assert systems == {"BERT-base", "CLIP", "SimVLM-base", "VisualBERT", "UNITER-base", "VL-BERT-base", "ViLBERT",
                       "LXMERT", "UniT", "FLAVA"}  # fmt: skip
    assert len(rows) == 11
    flava = rows["FLAVA full (Table 5 row 11)"]
    assert flava.cells["VQAv2 (fine-tune)", 0].value == 72.8
    with published.FILE.open(encoding="utf-8", newline="") as file:
        printed = [row for row in csv.DictReader(file) if row["source"] == "FLAVA paper, Table 5"]
    assert len(printed) == 130
    for row in printed:
        beside = rows[row["setting"]]
        cells = [cell for (key, _), cell in beside.cells.items() if key.startswith(f"{row['task']} (")]
        assert any(
            row["value"] in re.findall(r"[\d.]+", cell.shown) or cell.confidence == "corrected" for cell in cells
        ), row


@pytest.mark.parametrize(
    ("setting", "task", "shown", "value"),
    [
        ("ViT-B/16, released 400M model (Table 5 row 2)", "QQP", "76.8 / 53.9*", 65.35),
        ("ViT-B/16 trained on PMD (Table 5 row 10)", "QQP", "75.4 / 43.0*", 59.20),
        ("ViT-B/16 trained on PMD (Table 5 row 10)", "MRPC", "63.5 / 68.7*", 66.10),
    ],
)
def test_a_pair_stands_as_printed_and_keeps_the_doubt_of_either_number(
    setting: str, task: str, shown: str, value: float
) -> None:
    cell = column("flava35", "CLIP", setting).cells[f"{task} (fine-tune)", 0]
    assert cell.doubted and cell.shown == shown and cell.value == pytest.approx(value)
    assert f"mean {value:.2f}; " in cell.note and ("erratum: " in cell.note or "doubtful: " in cell.note)


def test_a_pair_is_as_sure_as_its_less_sure_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def joined(accuracy: str, f1: str) -> tuple[str, bool]:
        common = {"system": "S", "setting": "s", "task": "QQP", "split": "dev", "protocol": "fine-tune", "note": ""}
        parts = [
            {**common, "metric": metric, "value": "80.0", "source": "a table", "confidence": confidence}
            for metric, confidence in (("accuracy", accuracy), ("F1", f1))
        ]
        monkeypatch.setattr(published, "rows", lambda: tuple(parts))
        [found] = columns(FLAVA)
        return found.cells["QQP (fine-tune)", 0].confidence, found.cells["QQP (fine-tune)", 0].doubted

    assert joined("read", "read") == ("read", False)
    assert joined("read", "corrected") == joined("corrected", "read") == ("corrected", True)
    assert joined("corrected", "recalled") == ("recalled", True)


def test_a_number_of_another_metric_is_shown_with_a_mark_and_enters_no_average() -> None:
    unit = column("flava35", "UniT", "shared decoder, COCO init (Table 5 row 9)")
    mnli, qqp = unit.cells["MNLI (fine-tune)", 0], unit.cells["QQP (fine-tune)", 0]
    assert (mnli.shown, qqp.shown) == ("81.5†", "90.6†")
    assert mnli.note.startswith("accuracy (variant not stated) alone; UniT reports mismatched only")
    assert qqp.note == "accuracy alone; F1 not printed"
    assert {("MNLI (fine-tune)", 0), ("QQP (fine-tune)", 0)}.isdisjoint(unit.values())
    assert unit.values()["QNLI (fine-tune)", 0] == 88.0 and unit.cells["QNLI (fine-tune)", 0].shown == "88.0"


def test_every_suite_meets_published_numbers_for_each_of_its_figures() -> None:
    for name, tasks in SUITES.items():
        places = {place for c in columns(tasks) for place in c.cells}
        expected = {(task.key, number) for task in tasks for number in range(len(task.figures))}
        assert places == (expected if name != "own" else set()), name
    assert len(FLAVA) == 35 and len(VISION) == 22
    assert sum(len([f for f in t.figures if f.averaged]) for t in SUITES["multimodal"]) == 11


def test_neighbours_and_zero_shot_stand_beside_ours_of_the_same_protocol_and_enter_no_average() -> None:
    [imagenet] = [task for task in VISION if task.name == "ImageNet"]
    places = {figure.result: (imagenet.key, place) for place, figure in enumerate(imagenet.figures)}
    shown = {result: [c for c in columns(FLAVA) if place in c.cells] for result, place in places.items()}
    assert {(c.system, c.cells[places["knn.accuracy"]].value) for c in shown["knn.accuracy"]} == {
        ("DINO", 74.5), ("DINO", 78.3), ("DINO", 76.1), ("DINO", 77.4), ("DINO", 67.5), ("DINO", 69.3), ("DINO", 73.3),
        ("DINOv3", 82.2),
    }  # fmt: skip
    [flava] = shown["zero_shot.accuracy"]
    assert flava.cells[places["zero_shot.accuracy"]].value == 56.91
    assert flava.cells[places["zero_shot.top5_accuracy"]].value == 83.92
    cells = column("flava35", "FLAVA", "FLAVA full (col 6)").cells
    values = {place: cell.value for place, cell in cells.items()}
    with_both = values | {places["knn.accuracy"]: 10.0, places["zero_shot.accuracy"]: 20.0}
    assert averages(FLAVA, with_both) == averages(FLAVA, values)


def test_recalled_numbers_are_told_from_those_that_were_read() -> None:
    unit = column("unit", "UniT", "8 datasets, shared decoder, COCO init")
    confidence = {cell.confidence for cell in unit.cells.values()}
    assert "recalled" in confidence
    assert all(cell.printed for c in columns(SUITES["albef"]) for cell in c.cells.values())


def test_columns_stand_as_in_their_table() -> None:
    table = [c.setting for c in columns(FLAVA) if c.source == "FLAVA paper, Table 4"]
    assert table == [setting for _, setting, _, _ in TABLE_4]
