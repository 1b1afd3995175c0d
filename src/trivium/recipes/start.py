"""The model that a run starts from, in pretraining one of its own family, and the vocabulary that comes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from trivium.bundle import Bundle
from trivium.data.tokenizer import Tokenizer
from trivium.errors import TriviumError
from trivium.evaluate.reranking import UNTRAINED
from trivium.load import load, open_own
from trivium.models.finetuned import Reads
from trivium.recipes.data import Sources, make_tokenizer


def open_start(recipe: Any, resume_from: Path | None, family: type[nn.Module], name: str) -> tuple[Bundle | None, Any]:
    """The model to start from, if any, and the shape of the run's.

    Args:
        recipe: with `model` and `init`.
        resume_from: the model folder of a checkpoint, which goes before `init`.
        family, name: of model that the run trains; another is refused by a TriviumError.
    """
    if resume_from is None and recipe.init is None:
        return None, recipe.model
    start = load(recipe.init) if resume_from is None else open_own(resume_from)
    if not isinstance(start.model, family):
        path = resume_from or recipe.init
        raise TriviumError(
            f"{path} holds a model of the family {start.family}, and {name} starts from one of its own family: give one"
        )
    return start, start.model.config


def open_trained(init: str | None, resume_from: Path | None) -> Bundle:
    """The model that is fine-tuned. Raises TriviumError where none is named."""
    if init is None:
        raise TriviumError(
            "there is no model to fine-tune: name one with --init (a run, a model folder or a checkpoint)"
        )
    return load(init) if resume_from is None else open_own(resume_from)


def told_of_fusion(start: Bundle, reads: Reads) -> list[str]:
    """A sentence where no loss has trained what a model reads pictures and texts together with, on what its head reads
    in place of that, or reads through it all the same."""
    if start.fusion_trained is not False:
        return []
    if reads == "concatenated":
        return [
            f"{UNTRAINED}, so the head reads both vectors side by side; --head.fusion fused is the head on the fused"
            " class token all the same"
        ]
    if reads in ("states", "two_pictures"):
        return [
            f"{UNTRAINED}, and this head reads through it all the same: the rows of this task are the first to teach"
            " it, so pretrain with ITM or masked words before"
        ]
    return []


def vocabulary(
    recipe: Any,
    start: Bundle | None,
    sources: Sources,
    vocab_size: int,
    files: str = "bert or the path of its tokenizer.json",
) -> Tokenizer:
    """That of the model that a run starts from, where it has one, else as the recipe says.

    files: what a user may give. Raises TriviumError where words would be learned that the model never saw.
    """
    if start is not None and start.tokenizer is not None:
        return start.tokenizer
    if start is not None and recipe.data.vocabulary == "learned":
        raise TriviumError(
            f"{recipe.init} came without a tokenizer, and a vocabulary learned from this data would not be the one that"
            f" it was trained with: give --data.vocabulary {files}"
        )
    return make_tokenizer(recipe.data, sources, vocab_size)


def check_words(recipe: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises TriviumError where words of the data have no place in the model that a run starts from."""
    if tokenizer.vocab_size > vocab_size:
        raise TriviumError(
            f"the vocabulary has {tokenizer.vocab_size} words, the model of {recipe.init} {vocab_size}: give the"
            " vocabulary that it was trained with"
        )
