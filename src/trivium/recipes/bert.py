"""FLAVA's text side started from a BERT: its word embeddings and, where it has one, its head of masked words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trivium.bundle import Bundle
from trivium.data.tokenizer import Tokenizer
from trivium.errors import TriviumError
from trivium.load import start_text
from trivium.models.bert import Bert as WholeBert
from trivium.models.flava import Flava


@dataclass(frozen=True)
class Bert:
    """A BERT, of ours or in Hugging Face's layout."""

    path: str
    bundle: Bundle

    def vocabulary(self) -> Tokenizer:
        """Its own. Raises TriviumError where it came without."""
        if self.bundle.tokenizer is None:
            raise TriviumError(
                f"{self.path} holds neither tokenizer.json nor vocab.txt: name the vocabulary that this BERT was"
                " trained with, --data.vocabulary bert for the uncased English one or the path of a tokenizer.json"
            )
        return self.bundle.tokenizer

    def start(self, model: Flava) -> str:
        """Give a model what carries over, and say in one sentence what did and what did not.

        Raises TriviumError where width, vocabulary or positions differ, with the flag to set.
        """
        its, config = self.bundle.model, model.config
        assert isinstance(its, WholeBert)
        width, num_words, positions = its.config.width, its.config.vocab_size, its.config.max_length
        if width < config.width:
            flags = f"--model.width {width}"
            if width % config.num_heads:
                flags += f" --model.num-heads {math.gcd(width, config.num_heads)}"
            raise TriviumError(
                f"the BERT of {self.path} has width {width}, the model {config.width}: set {flags}, or choose a BERT of"
                f" width {config.width} or more"
            )
        if num_words != config.vocab_size:
            raise TriviumError(
                f"the BERT of {self.path} has {num_words:,} words, the vocabulary of this run {config.vocab_size:,}:"
                " choose with --data.vocabulary the one that this BERT was trained with"
            )
        if positions < config.max_length:
            raise TriviumError(
                f"the BERT of {self.path} has {positions} positions, the model {config.max_length}: set"
                f" --model.max-length {positions}"
            )
        taken, left = start_text(model, its)
        head = " and the head of masked words" if any(name.startswith("mlm_head.") for name in taken) else ""
        cut = f", {config.width} of their {width} channels by the words' principal axes" * (width > config.width)
        left_out = f"{len(left)} tensors, since BERT's blocks normalise after and FLAVA's before each sublayer"
        return (
            f"{self.path}: taken are the embeddings of {num_words:,} words and {config.max_length} positions{cut}{head}"
            f"; left out are {left_out}"
        )
