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
from trivium.data.transforms import ImageTransform
from trivium.evaluate import embedded, report
from trivium.evaluate.embedded import Evaluation
from trivium.evaluate.results import Result
from trivium.load import Bundle, load
from trivium.models.bert import Bert, BertConfig
from trivium.models.finetuned import HeadConfig
from trivium.recipes import finish
from trivium.recipes.prepared import on_drawings


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
        "answers": (
            "trivium ask RUN --image photo.jpg",
            'bundle.answer(["photo.jpg"], ["what is it?"])',
        ),
        "codes": ("trivium data codes", "load_image_tokenizer"),
    }
    found = {
        "words": flava, "pictures": dino, "texts": bert, "answers": replace(flava, head_config=head), "codes": None,
    }  # fmt: skip
    for use, bundle in found.items():
        assert finish.use_of(bundle)[0] == use
        call = finish.use_of(bundle)[1]
        page = html.unescape(report.render(report.Report("x", Evaluation(), use=use, call=call)))  # type: ignore[arg-type]
        for sentence in shown[use]:
            assert sentence in page, use
    text_alone = finish.use_of(replace(bert, head_config=replace(head, reads="text")))[1]
    assert text_alone == 'bundle.answer(texts=["so it is"])'
