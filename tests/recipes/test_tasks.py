"""The defaults of the published tasks against the tables that they come from."""

from __future__ import annotations

import pytest

from trivium.errors import TriviumError
from trivium.recipes.finetune import finetune
from trivium.recipes.tasks import TASKS
from trivium.train.optim import learning_rate, warmup_steps

# fairseq's table for RoBERTa-base on GLUE: learning rate, sentences of a batch, updates, warm-up updates, classes.
ROBERTA = {
    "mnli": (1e-5, 32, 123_873, 7_432, 3),
    "qnli": (1e-5, 32, 33_112, 1_986, 2),
    "qqp": (1e-5, 32, 113_272, 28_318, 2),
    "rte": (2e-5, 16, 2_036, 122, 2),
    "sst2": (1e-5, 32, 20_935, 1_256, 2),
    "mrpc": (1e-5, 16, 2_296, 137, 2),
    "cola": (1e-5, 16, 5_336, 320, 2),
    "stsb": (2e-5, 16, 3_598, 214, 1),
}
# FLAVA, appendix B.2 and the caption of its Table 4, which exchanges the two correlations.
REPORTED = {"mnli": "accuracy", "qnli": "accuracy", "rte": "accuracy", "sst2": "accuracy", "cola": "matthews",
            "stsb": "pearson", "mrpc": "accuracy_and_f1", "qqp": "accuracy_and_f1", "vqav2": "accuracy",
            "snli_ve": "accuracy", "hateful_memes": "auroc"}  # fmt: skip
# Learning rate, updates, side of the pictures in pixels (None: that of the model, 224 there).
FLAVA = {"vqav2": (1e-4, 44_000, 480), "snli_ve": (1e-5, 24_000, None), "hateful_memes": (1e-5, 24_000, None)}


@pytest.mark.parametrize("name", ROBERTA)
def test_glue_has_the_settings_of_roberta(name: str) -> None:
    recipe, (lr, batch, updates, warmup, classes) = finetune(name), ROBERTA[name]
    assert (recipe.optim.lr, recipe.data.batch, recipe.train.steps) == (lr, batch, updates)
    assert warmup_steps(recipe.optim, updates) == warmup
    assert (recipe.optim.betas, recipe.optim.eps, recipe.optim.weight_decay) == ((0.9, 0.98), 1e-6, 0.1)
    assert (recipe.optim.schedule, recipe.optim.final, recipe.optim.clip) == ("linear", 0.0, "none")
    assert (recipe.dropout, recipe.head.dropout, recipe.head.activation, recipe.head.hidden) == (
        0.1,
        0.1,
        "tanh",
        "width",
    )
    assert TASKS[name].gives == ("number" if classes == 1 else "class")
    half = (warmup + updates) // 2
    assert learning_rate(recipe.optim, half, updates) == pytest.approx(0.5, abs=1e-3)  # polynomial of power 1
    assert recipe.epochs is None


@pytest.mark.parametrize("name", FLAVA)
def test_pictures_with_texts_have_the_settings_of_flava(name: str) -> None:
    recipe, (lr, updates, side) = finetune(name), FLAVA[name]
    assert (recipe.optim.lr, recipe.train.steps, recipe.data.image_size) == (lr, updates, side)
    assert (recipe.data.batch, recipe.optim.weight_decay, recipe.optim.schedule) == (256, 0.01, "cosine")
    assert warmup_steps(recipe.optim, updates) == 2000
    assert recipe.head.hidden == 1536


@pytest.mark.parametrize("name", REPORTED)
def test_what_is_reported_is_what_the_paper_reports(name: str) -> None:
    assert TASKS[name].reported == REPORTED[name]
    assert TASKS[name].reported in TASKS[name].metrics


def test_every_published_task_is_there_and_another_is_named() -> None:
    assert set(TASKS) >= set(REPORTED)
    with pytest.raises(TriviumError, match="no task sst3: use one of cola, sst2"):
        finetune("sst3")
