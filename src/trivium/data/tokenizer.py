"""Text to token ids and back, over the ``tokenizers`` library.

One class serves every family of vocabulary: BERT's word pieces, a vocabulary learned from one's own text, and any
``tokenizer.json`` (Unigram, BPE, WordPiece) of any language. Easy to get wrong: the library's own trainer numbers its
pieces in the order of a hash map that differs from run to run (``Tokenizer.train`` pins it), and a file may carry a
truncation, a padding and a template of its own (they are switched off: ``encode`` alone says what a sequence is).

Legend: B texts, T tokens.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

# The library encodes a batch on threads of its own, which do not survive the fork of a loader's worker. Workers are our
# parallelism, so its threads stay off, unless the user's environment says otherwise.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from trivium.errors import TriviumError
from trivium.manifest import file_beside

BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# The names under which each role is usually found: BERT's; SentencePiece's and RoBERTa's; CLIP's.
ROLES = {
    "pad": ("[PAD]", "<pad>"),
    "cls": ("[CLS]", "<s>", "<bos>", "<|startoftext|>"),
    "sep": ("[SEP]", "</s>", "<eos>", "<|endoftext|>"),
    "mask": ("[MASK]", "<mask>"),
    "unk": ("[UNK]", "<unk>"),
}


class Tokenizer:
    """Token ids of texts. Built by ``wordpiece``, ``train`` or ``from_file``; cheap to pickle."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, origin: str = "this tokenizer") -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._origin = origin  # how messages name it
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        found = {role: next((name for name in names if name in vocabulary), None) for role, names in ROLES.items()}
        self.specials = {role: name for role, name in found.items() if name is not None}  # role -> token
        self._roles = {role: None if name is None else vocabulary[name] for role, name in found.items()}

    @classmethod
    def wordpiece(cls, vocabulary: Sequence[str], lowercase: bool = True) -> Tokenizer:
        """BERT's tokenizer (Devlin et al. 2019) on a list of word pieces, whose order gives the ids."""
        ids = {piece: number for number, piece in enumerate(vocabulary)}
        if len(ids) != len(vocabulary):
            twice = next(piece for number, piece in enumerate(vocabulary) if ids[piece] != number)
            raise TriviumError(f"the vocabulary holds {twice!r} twice: every word piece must stand on one line only")
        missing = [name for name in BERT_SPECIALS if name not in ids]
        if missing:
            raise TriviumError(f"the vocabulary of word pieces lacks {', '.join(missing)}: add each as a line")
        tokenizer = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(prefix="##")
        tokenizer.add_special_tokens(list(BERT_SPECIALS))
        # Not for `encode`, but for other programs that read the saved file.
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
        return cls(tokenizer)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, lowercase: bool = True) -> Tokenizer:
        """Learn `vocab_size` word pieces. The same texts, in any order, give the same vocabulary with the same ids."""
        normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        normalized = [normalizer.normalize_str(text) for text in texts]
        # The trainer breaks ties between merges by id, and gives ids to ##x in the order of a hash map. Named as
        # special tokens they get theirs first, in this order; `wordpiece` below then makes them ordinary pieces.
        inner = sorted({b for text in normalized for a, b in set(zip(text, text[1:], strict=False)) if _joined(a, b)})
        fixed = [*BERT_SPECIALS, *(f"##{character}" for character in inner)]
        learner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        learner.train_from_iterator(
            normalized, trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=fixed, show_progress=False)
        )
        ids = learner.get_vocab()
        if len(ids) > vocab_size:
            raise TriviumError(
                f"a vocabulary of {vocab_size:,} cannot hold the characters of this text: they alone need "
                f"{len(ids):,}; ask for more"
            )
        return cls.wordpiece(sorted(ids, key=ids.__getitem__), lowercase)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Any ``tokenizer.json`` of the ``tokenizers`` library."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise TriviumError(f"{path} does not exist: name a tokenizer.json") from None
        except (OSError, UnicodeDecodeError) as error:
            raise TriviumError(f"{path} cannot be read as a tokenizer.json: {error}") from None
        try:
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises a bare Exception
            raise TriviumError(f"{path} is no tokenizer.json of the tokenizers library: {error}") from None
        return cls(tokenizer, origin=str(path))

    def save(self, path: str | Path) -> None:
        """Write ``tokenizer.json``, whole or not at all."""
        with file_beside(Path(path)) as beside:
            beside.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """What ``tokenizer.json`` holds."""
        return self._tokenizer.to_str(pretty=True)

    def encode(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Ids of each text as [CLS] … [SEP], at most `max_length` of them: a text is cut, its [SEP] is kept."""
        assert max_length >= 2, "a sequence holds at least [CLS] and [SEP]"
        cls, sep = self.cls_id, self.sep_id
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[cls, *encoding.ids[: max_length - 2], sep] for encoding in encodings]

    def pad(self, sequences: Sequence[Sequence[int]], length: int | None = None) -> tuple[Tensor, Tensor]:
        """ids_BT (int64) and mask_BT (bool, True = a real token); T is `length`, or the longest sequence."""
        num_tokens = max(map(len, sequences), default=0) if length is None else length
        ids_BT = torch.full((len(sequences), num_tokens), self.pad_id, dtype=torch.int64)
        mask_BT = torch.zeros((len(sequences), num_tokens), dtype=torch.bool)
        for row, ids in enumerate(sequences):
            ids_BT[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            mask_BT[row, : len(ids)] = True
        return ids_BT, mask_BT

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special tokens."""
        return self._tokenizer.decode([int(number) for number in ids], skip_special_tokens=True)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows of a word embedding (a file may leave ids out)."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def pad_id(self) -> int:
        return self._role("pad")

    @property
    def cls_id(self) -> int:
        return self._role("cls")

    @property
    def sep_id(self) -> int:
        return self._role("sep")

    @property
    def sep_token(self) -> str:
        """How the separator is written inside a text: `encode` turns it into `sep_id`."""
        token = self._tokenizer.id_to_token(self.sep_id)
        assert token is not None
        return token

    @property
    def mask_id(self) -> int:
        return self._role("mask")

    @property
    def unk_id(self) -> int:
        return self._role("unk")

    @cached_property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that stand for no text, in order: never masked, and never drawn in place of a masked token."""
        added = self._tokenizer.get_added_tokens_decoder()
        special = {number for number, token in added.items() if token.special}
        return tuple(sorted(special | {number for number in self._roles.values() if number is not None}))

    @cached_property
    def continues(self) -> np.ndarray:
        """[vocab_size] bool: this piece continues the word of the token before it (for whole-word masking).

        WordPiece marks what continues (##), SentencePiece and byte-level BPE mark what begins (▁, Ġ). Vocabularies
        without either mark have whole words, so nothing continues; ones that mark the end of a word (CLIP's </w>)
        cannot say it piece by piece and are refused.
        """
        model = json.loads(self._tokenizer.to_str())["model"]
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if model.get("end_of_word_suffix"):
            raise TriviumError(
                f"{self._origin} marks where a word ends, not where it begins, so it cannot mask whole words: "
                "mask single tokens"
            )
        prefix = model.get("continuing_subword_prefix")
        begins = next((mark for mark in "▁Ġ" if any(piece.startswith(mark) for piece in vocabulary)), None)
        continues = np.zeros(self.vocab_size, dtype=bool)
        for piece, number in vocabulary.items():
            if prefix:
                continues[number] = piece.startswith(prefix) and piece != prefix
            elif begins:
                continues[number] = not piece.startswith(begins)
        continues[list(self.special_ids)] = False
        return continues

    def _role(self, role: str) -> int:
        number = self._roles[role]
        if number is None:
            names = " or ".join(ROLES[role])
            raise TriviumError(f"{self._origin} has no {role} token: its vocabulary must hold {names}")
        return number


def _joined(first: str, second: str) -> bool:
    """Whether BERT's pre-tokenizer leaves two neighbouring characters in one word."""
    return not (first.isspace() or second.isspace() or _is_punctuation(first) or _is_punctuation(second))


def _is_punctuation(character: str) -> bool:
    if character.isascii():
        return character.isprintable() and not character.isalnum() and character != " "
    return unicodedata.category(character).startswith("P")
