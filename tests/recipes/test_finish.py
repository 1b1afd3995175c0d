"""What the evaluation of a model alone knows of its training."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.dino_batches import random_dino
from tests.recipes.shop import checkpoint
from trivium.data.tokenizer import BERT_SPECIALS, Tokenizer
from trivium.data.transforms import ImageTransform
from trivium.evaluate import embedded, report
from trivium.evaluate.embedded import Evaluation
from trivium.evaluate.results import Result
from trivium.load import Bundle, load
from trivium.models.bert import Bert, BertConfig
from trivium.models.finetuned import HeadConfig
from trivium.models.unit import Unit, UnitConfig, UnitTask
from trivium.recipes import finish
from trivium.recipes.flava import flava as flava_recipe
from trivium.recipes.prepared import on_drawings
from trivium.recipes.unimodal import mim, mlm


def test_a_model_folder_says_at_which_share_of_false_pairs_matching_was_trained(
    twenty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []

    def suite(bundle: Bundle, false_share: float = 0.5, say: Callable[[str], None] = print) -> Evaluation:
        """The suite itself, and what it does with the share, is tested in tests/evaluate/."""
        shares.append(false_share)
        return Evaluation({"itm.accuracy": Result(0.7)})

    monkeypatch.setattr(embedded, "run", suite)
    bundle = load(checkpoint(twenty, 20) / "model")
    found = on_drawings(bundle, print)
    assert found.not_applicable == []
    older = on_drawings(replace(bundle, false_pairs=None), print)
    assert "takes half of the training pairs as false" in older.not_applicable[0]
    assert shares == [0.1, 0.5]


def test_a_page_says_how_such_a_model_is_used(twenty: Path) -> None:
    flava = load(checkpoint(twenty, 20) / "model")
    torch.manual_seed(0)
    head = HeadConfig("colours", "fused", "class", 16, 2)
    dino = Bundle("dino", random_dino(seed=1, dtype=torch.float32).eval(), None, ImageTransform(32))
    bert = Bundle("bert", Bert(BertConfig(32, 4, 64, 2, 20, 16)).eval(), flava.tokenizer, ImageTransform(32))
    shown = {
        "words": ('trivium search RUN "red mug"', "trivium embed RUN FOLDER"),
        "pictures": ("trivium search RUN --picture mug.jpg", "encode_image"),
        "texts": ("trivium embed RUN lines.txt --text", "encode_text"),
        "questions": (
            "trivium ask RUN --image photo.jpg",
            'bundle.answer(["photo.jpg"], ["what is it?"])',
        ),
        "codes": ("trivium data codes", "load_image_tokenizer"),
    }
    found = {
        "words": flava, "pictures": dino, "texts": bert, "questions": replace(flava, head_config=head), "codes": None,
    }  # fmt: skip
    for use, bundle in found.items():
        assert finish.use_of(bundle)[0] == use
        call = finish.use_of(bundle)[1]
        page = html.unescape(report.render(report.Report("x", Evaluation(), use=use, call=call)))  # type: ignore[arg-type]
        for sentence in shown[use]:
            assert sentence in page, use
    for changed, use, call in (
        ({"reads": "text"}, "answers", 'bundle.answer(texts=["so it is"])'),
        ({"gives": "number"}, "answers", 'bundle.answer(["photo.jpg"], ["what is it?"])'),
        ({"num_pictures": 2}, "answers", f"bundle.answer({finish.ANSWERED['two_pictures']})"),
    ):
        assert finish.use_of(replace(flava, head_config=replace(head, **changed))) == (use, call)  # type: ignore[arg-type]
    for made, use in ((mim("tiny"), "pictures"), (mlm("tiny"), "texts"), (flava_recipe("tiny"), "words")):
        assert finish.use_of(flava, made)[0] == use


def test_a_unit_is_used_by_what_its_tasks_read() -> None:
    tasks = {
        "boxes": UnitTask("vg", "detection", "image", 4, 0, 4), "pictures": UnitTask("vqa", "labels", "both", 3, 1, 1),
        "texts": UnitTask("sst2", "labels", "text", 2, 2, 1),
    }  # fmt: skip
    for use, task in tasks.items():
        model = Unit(UnitConfig.of_size("tiny", tasks=(task,), text_layers=int(task.reads != "image"))).eval()
        tokenizer = Tokenizer.wordpiece(list(BERT_SPECIALS))
        assert finish.use_of(Bundle("unit", model, tokenizer, ImageTransform(32), max_length=16))[0] == use
