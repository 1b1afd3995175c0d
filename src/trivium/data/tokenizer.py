"""Text to token ids and back, over the ``tokenizers`` library.

One class serves every family of vocabulary: BERT's word pieces, a vocabulary learned from one's own text, CLIP's byte
pairs, and any ``tokenizer.json`` (Unigram, BPE, WordPiece) of any language. Easy to get wrong: the library's own
trainer numbers its pieces in the order of a hash map that differs from run to run (``Tokenizer.train`` pins it), and a
file may carry a truncation, a padding and a template of its own (they are switched off: ``encode`` alone says what a
sequence is).

Legend: B texts, T tokens.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import unicodedata
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain
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
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORDS = (
    rf"""{re.escape(CLIP_START)}|{re.escape(CLIP_END)}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+"""
)
ANSWER_TOKENS = 32  # of an answer that is written (see `for_answers`), [CLS] and [SEP] among them
UNREAD = "holds nothing that this model reads, only marks that it leaves out"  # what is said of a text (see `reads`)
CLIP_MERGES = 49152 - 256 - 2  # of the published file, which holds more lines
# The names under which each role is usually found: BERT's; SentencePiece's and RoBERTa's; CLIP's, which has no pad of
# its own: whatever stands after the end token, no token before it sees.
ROLES = {
    "pad": ("[PAD]", "<pad>", CLIP_END),
    "cls": ("[CLS]", "<s>", "<bos>", CLIP_START),
    "sep": ("[SEP]", "</s>", "<eos>", CLIP_END),
    "mask": ("[MASK]", "<mask>"),
    "unk": ("[UNK]", "<unk>"),
}


class Tokenizer:
    """Token ids of texts. Built by ``wordpiece``, ``train``, ``byte_pairs`` or ``from_file``; cheap to pickle."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, origin: str = "this tokenizer") -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._origin = origin  # how messages name it
        self._marks_ends = getattr(tokenizer.model, "end_of_word_suffix", None) == "</w>"
        if self._marks_ends:  # files leave the marks where they are; Ġ is how a space is written among bytes
            tokenizer.decoder = decoders.Sequence([decoders.Replace("</w>", "Ġ"), decoders.ByteLevel()])
        self._closes = not _is_open(tokenizer.post_processor)  # whether a sequence ends with the separator
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
    def byte_pairs(cls, ids: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Tokenizer:
        """CLIP's tokenizer (Radford et al. 2021, section 2.4): byte pairs within lower-cased words of marked ends.

        Texts are composed (NFC), white space is collapsed. OpenAI's code also mends what was decoded wrongly (ftfy) and
        takes HTML's escapes as what they stand for; Hugging Face's does neither, as here: clean such captions before.
        """
        missing = [name for name in (CLIP_START, CLIP_END) if name not in ids]
        if missing:
            raise TriviumError(
                f"the vocabulary of byte pairs lacks {' and '.join(missing)}: these are not CLIP's files"
            )
        try:
            model = models.BPE(
                dict(ids), list(merges), continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=CLIP_END
            )
        except Exception as error:  # the library raises a bare Exception
            raise TriviumError(f"merges and vocabulary do not belong together: {error}") from None
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        words = pre_tokenizers.Split(tokenizers.Regex(CLIP_WORDS), behavior="removed", invert=True)
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
        tokenizer.add_special_tokens([CLIP_START, CLIP_END])
        # Not for `encode`, but for other programs that read the saved file.
        tokenizer.post_processor = processors.RobertaProcessing(
            (CLIP_END, ids[CLIP_END]), (CLIP_START, ids[CLIP_START]), trim_offsets=False, add_prefix_space=False
        )
        return cls(tokenizer)

    @classmethod
    def from_vocabulary_and_merges(cls, vocabulary: Path, merges: Path) -> Tokenizer:
        """CLIP's tokenizer as Hugging Face keeps it: vocab.json and merges.txt."""
        try:
            ids = json.loads(vocabulary.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TriviumError(f"{vocabulary} cannot be read as a vocabulary: {error}") from None
        if not isinstance(ids, dict) or not all(type(number) is int for number in ids.values()):
            raise TriviumError(f"{vocabulary} is no vocabulary: it must be a JSON object of pieces and their ids")
        return cls.byte_pairs(ids, _read_merges(merges, None))

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Any ``tokenizer.json`` of the ``tokenizers`` library, or OpenAI's list of byte pairs, which ends in .txt or
        .txt.gz (bpe_simple_vocab_16e6.txt.gz)."""
        if str(path).endswith((".txt", ".txt.gz")):
            return cls._from_openai(Path(path))
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

    @classmethod
    def _from_openai(cls, path: Path) -> Tokenizer:
        """Ids are places in: all bytes, all bytes at the end of a word, the merges in their order, start and end."""
        merges = _read_merges(path, CLIP_MERGES)
        characters = [_BYTES[number] for number in (*_PRINTABLE, *(n for n in range(256) if n not in _PRINTABLE))]
        pieces = [*characters, *(f"{character}</w>" for character in characters), *map("".join, merges)]
        return cls.byte_pairs({piece: n for n, piece in enumerate([*pieces, CLIP_START, CLIP_END])}, merges)

    def save(self, path: str | Path) -> None:
        """Write ``tokenizer.json``, whole or not at all."""
        with file_beside(Path(path)) as beside:
            beside.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """What ``tokenizer.json`` holds."""
        return self._tokenizer.to_str(pretty=True)

    def for_captions(self) -> Tokenizer:
        """The same vocabulary as ALBEF reads captions with (Li et al. 2021, the public code): small letters, no marks
        of punctuation, a hyphen or slash parts words; [CLS] in front and no [SEP] at the end. Its file says all that.
        One that does so already is left as it is.
        """
        if not self._closes and self._after_caption_steps() is not None:
            return self
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        copy.normalizer = normalizers.Sequence([*_caption_steps(), *([copy.normalizer] if copy.normalizer else [])])
        first = self._tokenizer.id_to_token(self.cls_id)
        copy.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A $B", special_tokens=[(first, self.cls_id)]
        )
        return Tokenizer(copy, self._origin)

    def for_answers(self) -> Tokenizer:
        """The same vocabulary as ALBEF writes answers with (the public code): marks stay, and [SEP] ends each. Where
        texts are not read `for_captions`, answers are encoded as they are."""
        if self._closes:
            return self
        state = json.loads(self._tokenizer.to_str())
        if (steps := self._after_caption_steps()) is not None:
            state["normalizer"] = {"type": "Sequence", "normalizers": steps}
        copy = tokenizers.Tokenizer.from_str(json.dumps(state))
        ends = (self.specials["sep"], self.sep_id), (self.specials["cls"], self.cls_id)
        copy.post_processor = processors.BertProcessing(*ends)
        return Tokenizer(copy, self._origin)

    def _after_caption_steps(self) -> list[object] | None:
        """How a text is made normal once it was read as a caption; None: it is not read as one."""
        added = json.loads(normalizers.Sequence(_caption_steps()).__getstate__())["normalizers"]
        steps = (json.loads(self._tokenizer.to_str())["normalizer"] or {}).get("normalizers", [])
        return steps[len(added) :] if steps[: len(added)] == added else None

    def encode(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Ids of each text as [CLS] … [SEP], at most `max_length` of them: a text is cut, its [SEP] is kept. Without
        [SEP] where the vocabulary is one `for_captions`."""
        assert max_length >= 2, "a sequence holds at least [CLS] and [SEP]"
        cls, end = self.cls_id, [self.sep_id] if self._closes else []
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[cls, *encoding.ids[: max_length - 1 - len(end)], *end] for encoding in encodings]

    def is_bare(self, ids: Sequence[int]) -> bool:
        """Whether what `encode` or `encode_task` gave has no token of a text, as of marks alone where the vocabulary
        leaves out marks."""
        return all(number in (self.cls_id, self.sep_id) for number in ids)

    def reads(self, text: str) -> bool:
        """Whether anything of a text becomes a token."""
        return not self.is_bare(self.encode([text], 3)[0])

    def words(self, text: str, max_length: int) -> list[tuple[str, int, int]]:
        """Each word of a text as it is read, with the place of its first token in `encode` and that after its last."""
        [ids] = self.encode([text], max_length)
        room = len(ids) - 1 - (1 if self._closes else 0)
        word_ids = self._tokenizer.encode(text, add_special_tokens=False).word_ids[:room]
        found: list[tuple[str, int, int]] = []
        for place, word in enumerate(word_ids, start=1):
            if found and word == word_ids[place - 2] and word is not None:
                found[-1] = (found[-1][0], found[-1][1], place + 1)
            else:
                found.append(("", place, place + 1))
        return [(self.decode(ids[first:end]), first, end) for _, first, end in found]

    def encode_pair(self, first: str, second: str, max_length: int) -> tuple[list[int], list[int]]:
        """Ids of two texts as [CLS] first [SEP] second [SEP], at most `max_length` of them, and the segment of each
        (0 up to the first [SEP], then 1). Too long a pair is cut word piece by word piece at its longer text."""
        assert max_length >= 3, "a pair holds at least [CLS] and two [SEP]"
        one, other = (
            encoding.ids for encoding in self._tokenizer.encode_batch_fast([first, second], add_special_tokens=False)
        )
        room = max_length - 3
        # The shorter keeps all where it has at most half of the room; of an odd room the first has one more.
        keep = max(room - len(other), min(len(one), (room + 1) // 2))
        one = one[:keep]
        other = other[: room - len(one)]
        ids = [self.cls_id, *one, self.sep_id, *other, self.sep_id]
        return ids, [0] * (len(one) + 2) + [1] * (len(other) + 1)

    def encode_task(
        self, first: str, second: str | None, max_length: int, segments: bool
    ) -> tuple[list[int], list[int]]:
        """Ids and segments of the text of a task, or of its two.

        segments: whether the model tells a first text from a second; if not, two are one text with a blank between
        them, as for a causal model that is read at its first end token.
        """
        if second is not None and segments:
            return self.encode_pair(first, second, max_length)
        [ids] = self.encode([first if second is None else f"{first} {second}"], max_length)
        return ids, [0] * len(ids)

    def pad(self, sequences: Sequence[Sequence[int]], length: int | None = None) -> tuple[Tensor, Tensor]:
        """ids_BT (int64) and mask_BT (bool, True = a real token); T is `length`, or the longest sequence."""
        lengths_B = np.fromiter(map(len, sequences), np.int64, len(sequences))
        longest = int(lengths_B.max(initial=0))
        num_tokens = longest if length is None else length
        assert longest <= num_tokens, f"a sequence of {longest} tokens does not fit into {num_tokens}"
        mask_BT = np.arange(num_tokens) < lengths_B[:, None]
        ids_BT = np.full(mask_BT.shape, self.pad_id)
        ids_BT[mask_BT] = np.fromiter(chain.from_iterable(sequences), np.int64, int(lengths_B.sum()))
        return torch.from_numpy(ids_BT), torch.from_numpy(mask_BT)

    def pad_task(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, Tensor, Tensor]:
        """Of what `encode_task` gave: ids_BT, mask_BT and segments_BT (int64, 0 where there is no token)."""
        ids_BT, mask_BT = self.pad([ids for ids, _ in texts])
        segments_BT = torch.zeros_like(ids_BT)
        for row, (_, segments) in enumerate(texts):
            segments_BT[row, : len(segments)] = torch.tensor(segments)
        return ids_BT, mask_BT, segments_BT

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special tokens."""
        text = self._tokenizer.decode([int(number) for number in ids], skip_special_tokens=True)
        return text.rstrip(" ") if self._marks_ends else text

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


# How byte-level vocabularies write each byte: as itself where that is a visible character, else as one from 256 on.
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_BYTES = dict(zip((n for n in range(256) if n not in _PRINTABLE), map(chr, range(256, 512)), strict=False))
_BYTES |= {number: chr(number) for number in _PRINTABLE}


def _read_merges(path: Path, limit: int | None) -> list[tuple[str, str]]:
    """Pairs of pieces, a line each, under a first line that says what the file is."""
    try:
        data = path.read_bytes()
        lines = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8").splitlines()
    except FileNotFoundError:
        raise TriviumError(f"{path} does not exist: name a list of byte pairs") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise TriviumError(f"{path} cannot be read as a list of byte pairs: {error}") from None
    merges = []
    for number, line in enumerate(lines[1 : None if limit is None else limit + 1], start=2):
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise TriviumError(f"{path}, line {number}: {line[:40]!r} is no pair of pieces with a space between them")
        merges.append((left, right))
    return merges


def _is_open(processor: object) -> bool:
    """Whether a file's template is BERT's [CLS] and then the text, with nothing at its end. Templates of other
    vocabularies are not followed: `encode` alone says what a sequence is."""
    if not isinstance(processor, processors.TemplateProcessing):
        return False
    parts = json.loads(processor.__getstate__())["single"]
    names = [next(iter(part.values()))["id"] for part in parts]
    return names == [BERT_SPECIALS[2], "A"]


def _caption_steps() -> list[normalizers.Normalizer]:
    """What the public code of ALBEF does to a caption (see `for_captions`)."""
    return [
        normalizers.Lowercase(),
        normalizers.Replace(tokenizers.Regex(r"""[,.'!?"()*#:;~]"""), ""),
        normalizers.Replace(tokenizers.Regex("[-/]"), " "),
        normalizers.Replace("<person>", "person"),
    ]


def _joined(first: str, second: str) -> bool:
    """Whether BERT's pre-tokenizer leaves two neighbouring characters in one word."""
    return not (first.isspace() or second.isspace() or _is_punctuation(first) or _is_punctuation(second))


def _is_punctuation(character: str) -> bool:
    if character.isascii():
        return character.isprintable() and not character.isalnum() and character != " "
    return unicodedata.category(character).startswith("P")
