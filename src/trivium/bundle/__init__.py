"""A model with all that it takes to use it; pictures and strings in, tensors out. On disk it is a *model folder*.

B batch, C channels, H height, W width, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trivium.bundle import model_folder
from trivium.bundle.answers import Answer, own_list, ranked_by, ranked_list, written
from trivium.bundle.asked import Asked, asked_of, names_unknown, own_answers
from trivium.bundle.heat import Heat, by_words
from trivium.bundle.pictures import Picture, Pictures, check_sides, listed, normalised, read_picture
from trivium.bundle.texts import check_read
from trivium.bundle.untrained import no_cosine, no_matching
from trivium.data.tokenizer import Tokenizer
from trivium.data.transforms import ImageTransform, padded
from trivium.errors import TriviumError
from trivium.manifest import written_beside
from trivium.models.encoded import Answers, Detects, Encoded, EncodesImage, EncodesText, Fuses, Matches, Objects
from trivium.models.finetuned import FineTuned, HeadConfig
from trivium.models.grounding import Compares, Grounds, picture_heat, word_heat
from trivium.models.image_tokenizer import ImageTokenizer
from trivium.tensor_files import SHARD_BYTES

Strings = str | Sequence[str]
Ability = TypeVar("Ability")


@dataclass
class Bundle:
    """A model with its tokenizer, image transform, image tokenizer and label names.

    Nothing here trains: every method runs in eval mode without gradients, on the device where the model is.
    """

    family: str
    model: nn.Module
    tokenizer: Tokenizer | None
    transform: ImageTransform  # of no meaning where the model reads no pictures
    image_tokenizer: ImageTokenizer | None = None
    labels: list[str] | None = None
    max_length: int = 512  # tokens of a text, with [CLS] and [SEP]; longer ones are cut
    false_pairs: float | None = None  # share of them when matching was trained; None: not known
    fusion_trained: bool | None = None  # whether any loss reached the encoder that reads both; None: not known
    untrained: tuple[str, ...] = ()  # of matching head and projections, those as they were drawn (untrained.py)
    head: nn.Module | None = None  # of a fine-tuned model
    head_config: HeadConfig | None = None
    labels_of: dict[str, list[str]] | None = None  # of a model of several tasks; attributes as "TASK.attributes"
    tuned_for: tuple[str, ...] = ()  # retrieval, for which there is no head: the task, or those that it may have been

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def encode_image(self, pictures: Pictures, batch: int = 32) -> Encoded:
        """One picture or several -> `Encoded` of B rows.

        Args:
            pictures: paths, encoded bytes, Pillow pictures or uint8 arrays [H, W, 3], prepared by `transform`; or a
                tensor [B, 3, H, W], uint8 or float in [0, 1], taken as it is.
            batch: pictures that go through the model at once.
        """
        return self._joined(list(self.images(listed(pictures), batch)), "no picture to encode")

    def images(self, pictures: Iterable[Picture] | Tensor, batch: int = 32) -> Iterator[Encoded]:
        """`encode_image` piece by piece, reading pictures only when their turn comes: for more than memory holds."""
        model = self._able(EncodesImage, "reads no pictures")  # type: ignore[type-abstract]
        rest = iter(pictures)
        while several := list(islice(rest, batch)):
            pixels_BCHW, sizes_B2 = padded([self._pixels(one, pictures) for one in several])
            pixels_BCHW = self._normalised(pixels_BCHW)
            with _evaluating(self.model):
                sizes = () if sizes_B2 is None else (sizes_B2.to(self.device),)  # of a family that pads
                yield self._placed(model.encode_image(pixels_BCHW, *sizes)).settled()

    def encode_text(self, texts: Strings, batch: int = 64) -> Encoded:
        """One string or several -> `Encoded` of B rows, padded to the longest (at most `max_length` tokens)."""
        model = self._able(EncodesText, "reads no texts")  # type: ignore[type-abstract]
        if self.tokenizer is None:
            raise TriviumError(
                "this checkpoint came without a tokenizer: set bundle.tokenizer = Tokenizer.from_file(...) to the one "
                "that it was trained with"
            )
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            return self._joined([], "no text to encode")
        ids_BT, mask_BT = self.tokenizer.pad(self.tokenizer.encode(texts, self.max_length))
        parts = []
        for ids, mask in zip(ids_BT.split(batch), mask_BT.split(batch), strict=True):
            with _evaluating(self.model):
                parts.append(self._placed(model.encode_text(ids.to(self.device), mask.to(self.device))).settled())
        return self._joined(parts, "no text to encode")

    def fuse(self, image: Encoded, text: Encoded) -> Encoded:
        """Pictures and texts read together, row by row; a single picture or text is paired with every row."""
        model = self._able(Fuses, "does not read a picture and a text together")  # type: ignore[type-abstract]
        rows = max(len(image.states), len(text.states))
        for name, encoded in (("pictures", image), ("texts", text)):
            if len(encoded.states) not in (1, rows):
                raise TriviumError(f"{len(image.states)} pictures and {len(text.states)} texts do not pair up: give as "
                                   f"many {name} as the others, or one")  # fmt: skip
        with _evaluating(self.model):
            return model.fuse(image.repeated(rows), text.repeated(rows)).settled()

    def match(self, pictures: Pictures | Encoded, texts: Strings | Encoded) -> Tensor:
        """Probability [B] that picture and text of a row belong together. Refused of a head that nothing trained."""
        model = self._able(Matches, "has no head that matches pictures with texts")  # type: ignore[type-abstract]
        self._refuse(no_matching(self.untrained), "whether a picture and a text belong together")
        image = pictures if isinstance(pictures, Encoded) else self.encode_image(pictures)
        text = texts if isinstance(texts, Encoded) else self.encode_text(texts)
        fused = self.fuse(image, text)
        with _evaluating(self.model):
            return model.match(fused).float().softmax(-1)[:, 1]

    def detect(self, pictures: Pictures, task: str | None = None, batch: int = 8) -> list[Objects]:
        """The objects in one picture or several.

        Args:
            pictures: as `encode_image` takes them.
            task: of a model that detects for several; None: its first.
        """
        model = self._able(Detects, "finds no objects")  # type: ignore[type-abstract]
        pictures = listed(pictures)
        found: list[Objects] = []
        rest = iter(pictures)
        while several := list(islice(rest, batch)):
            whole = [self._read(one, pictures, self.transform.decoded) for one in several]
            pixels_BCHW, sizes_B2 = padded([self._pixels(one, pictures) for one in whole])
            pixels_BCHW = self._normalised(pixels_BCHW)
            with _evaluating(self.model):
                seen = model.detect(pixels_BCHW, None if sizes_B2 is None else sizes_B2.to(self.device), task)
            order_BQ = seen.scores_BQ.argsort(dim=1, descending=True, stable=True)
            for row, picture in enumerate(whole):
                height, width = picture.shape[-2:] if isinstance(picture, Tensor) else picture.shape[:2]
                order = order_BQ[row]
                attributes = None if seen.attributes_BQ is None else seen.attributes_BQ[row][order].cpu()
                boxes_Q4 = seen.boxes_BQ4[row][order].float().cpu() * torch.tensor([width, height, width, height])
                found.append(Objects(seen.scores_BQ[row][order].cpu(), seen.labels_BQ[row][order].cpu(), boxes_Q4,
                                     attributes))  # fmt: skip
        return found

    def ground(
        self,
        pictures: Pictures | Encoded,
        texts: Strings,
        block: int | None = None,
        batch: int = 16,
    ) -> list[Heat]:
        """Where in its picture each text is looked for, word by word: Grad-CAM of the matching head through the
        attention from words to patches (models/grounding.py). A single picture is paired with every text. Of a text
        that is given alone it is told where it is cut, and refused where nothing of it is read. Refused too is a
        matching head that nothing trained.

        Args:
            block: of those in which words attend patches, counted from 0; None: the family's own choice.
        """
        model = self._able(Grounds, "has no attention from words to patches that a matching head judges")  # type: ignore[type-abstract]
        self._refuse(no_matching(self.untrained), "where in a picture words are")
        image = pictures if isinstance(pictures, Encoded) else self.encode_image(pictures)
        if isinstance(texts, str):  # of many, as an evaluation has them, one that is empty must not stop the others
            if self.tokenizer is not None:
                check_read(texts, self.tokenizer, self.max_length, "text")
            texts = [texts]
        text = self.encode_text(texts)
        if len(image.states) not in (1, len(texts)):
            raise TriviumError(f"{len(image.states)} pictures and {len(texts)} texts do not pair up: give as many")
        parts = zip(image.repeated(len(texts)).split(batch), text.split(batch), strict=True)
        try:
            with _evaluating(self.model):
                heat_BTP = torch.cat([word_heat(model, *part, block).float().cpu() for part in parts])
        except IndexError:
            raise TriviumError(f"there is no block {block} in which words attend patches: count from 0") from None
        assert self.tokenizer is not None, "who encodes text has one"
        words = [self.tokenizer.words(each, self.max_length) for each in texts]
        return by_words(heat_BTP, text.mask, words)

    def ground_by_cosine(
        self, pictures: Pictures, texts: Strings, block: int | None = None, batch: int = 16
    ) -> list[Tensor]:
        """Where the picture's own tower looks for each text, [n, n], row by row: the same of its class token's
        attention, for the cosine with the text (ALBEF's rows "itc")."""
        model = self._able(Compares, "has no picture's tower whose attention can be watched")  # type: ignore[type-abstract]
        self._refuse(no_cosine(self.untrained), "by the cosine where in a picture words are")
        pixels, _ = self._stacked(pictures)
        text_BD = self.encode_text(texts).projected
        if len(pixels) != len(text_BD):
            raise TriviumError(f"{len(pixels)} pictures and {len(text_BD)} texts do not pair up: give as many")
        side, found = pixels.shape[-1] // self._patch, []
        try:
            with _evaluating(self.model):
                for part, text in zip(pixels.split(batch), text_BD.split(batch), strict=True):
                    part = self._normalised(part)
                    found += list(picture_heat(model, part, text, block).float().cpu().unflatten(1, (-1, side)))
        except IndexError:
            raise TriviumError(f"the picture's tower has no block {block}: count from 0") from None
        return found

    def answer(
        self,
        pictures: Pictures | None = None,
        texts: Strings | None = None,
        second_texts: Strings | None = None,
        batch: int = 32,
        second_pictures: Pictures | None = None,
        task: str | None = None,
    ) -> Tensor:
        """What a fine-tuned model answers, or a UniT for one of its tasks, row by row: a probability of each label
        [B, K], how right each answer is [B, K], or a number [B, 1].

        Args: those that its task reads; second_texts, second_pictures: of a task of two; task: of a UniT that has
            several of what is given (None: where one of them is of questions, that one).
        """
        given: Any = "text" if pictures is None else "image" if texts is None else "both"
        asked = asked_of(self, task, given)
        pixels = second = sizes = ids = mask = segments = None
        if asked.reads != "text":
            if pictures is None:
                raise TriviumError(f"the task {asked.task} reads pictures: give them")
            pixels, sizes = self._stacked(pictures)
            if sizes is not None and asked.own is None:
                raise TriviumError("these pictures differ in size as this model reads them: give them one by one")
            if asked.num_pictures == 2 and second_pictures is None:
                raise TriviumError(f"the task {asked.task} reads two pictures at once: give the second ones")
            if second_pictures is not None:
                second, _ = self._stacked(second_pictures)
                if asked.num_pictures != 2 or len(second) != len(pixels):
                    raise TriviumError(
                        f"{len(pixels)} pictures and {len(second)} second ones do not pair up, or the task"
                        f" {asked.task} reads one at a time"
                    )
        if asked.reads != "image":
            if texts is None or self.tokenizer is None:
                raise TriviumError(f"the task {asked.task} reads texts: give them, and a tokenizer")
            ids, mask, segments = self._task_texts(texts, second_texts, asked)
        if pixels is not None and ids is not None and len(pixels) != len(ids):
            raise TriviumError(f"{len(pixels)} pictures and {len(ids)} texts do not pair up: give as many")
        whole, says = self._answering(asked)
        answers = []
        for first in range(0, len(ids if pixels is None else pixels), batch):  # type: ignore[arg-type]
            parts = [
                None if t is None else t[first : first + batch].to(self.device)
                for t in (pixels, sizes, ids, mask, segments)
            ]
            if parts[0] is not None:
                if second is not None:
                    parts[0] = torch.cat([parts[0], second[first : first + batch].to(self.device)])
                parts[0] = self._normalised(parts[0])
            with _evaluating(whole):
                answers.append(says(*parts))
        return torch.cat(answers)

    def _answering(self, asked: Asked) -> tuple[nn.Module, Callable[..., Tensor]]:
        """Model with head, and what it says of pixels, sizes, ids, mask and segments."""
        if asked.own is not None:
            return self.model, partial(own_answers, self.model, asked.own)
        assert self.head is not None and self.head_config is not None
        ranked = None
        if isinstance(self.head, Answers):
            ranked = ranked_list(self.labels, self.tokenizer, int(self.model.config.max_length))  # type: ignore[union-attr, arg-type]
        whole = FineTuned(self.model, self.head, self.head_config, ranked).to(self.device)
        return whole, lambda pixels, sizes, *texts: whole.answers(whole(pixels, *texts))

    def ask(
        self,
        picture: Picture,
        question: str,
        k: int = 5,
        *,
        second_picture: Picture | None = None,
        answers: Sequence[str] | None = None,
        freely: bool = False,
        task: str | None = None,
    ) -> list[Answer]:
        """The k likeliest answers to a question on a picture, or on two; best first.

        A model that writes its answers ranks those of `labels`, and probabilities are shares among the ones it reads to
        their end; without a list it writes what it finds. One that scores its labels gives what `answer` does. A
        question that is longer than the model reads is cut, with a warning.

        Args:
            answers: a list of one's own, of a model that writes; what stands there twice counts once.
            freely: write, though there is a list: probabilities are those of each answer among all texts.
            task: of a UniT, as in `answer`.
        """
        of = asked_of(self, task, "both")
        if not question.strip():
            raise TriviumError("the question is empty")
        if k < 1:
            raise TriviumError(f"{k} answers are asked for: it must be 1 at least")
        if of.gives == "number" or of.reads != "both":
            raise TriviumError(f"the task {of.task} asks nothing about a picture in words: see `answer`")
        if self.tokenizer is not None:
            check_read(question, self.tokenizer, of.max_length, "question")
        writes = isinstance(self.head, Answers)
        if not writes and (answers is not None or freely):
            raise TriviumError("this model chooses among its labels and writes nothing: leave out a list of its own")
        if freely or (writes and answers is None and not self.labels):
            if second_picture is not None:
                raise TriviumError(f"the task {of.task} reads one picture at a time: leave out the second")
            fused = self.fuse(self.encode_image([picture]), self.encode_text([question]))
            assert self.tokenizer is not None  # or there were no question
            assert isinstance(self.head, Answers)
            with _evaluating(self.model):
                return written(self.head, fused, self.tokenizer, k)
        asked = self
        if answers is not None:
            assert self.tokenizer is not None  # or there were no question
            most = int(self.model.config.max_length)  # type: ignore[union-attr, arg-type]
            asked = replace(self, labels=own_list(answers, self.tokenizer, most))
        second = None if second_picture is None else [second_picture]
        found_K = asked.answer([picture], [question], second_pictures=second, task=of.task)[0]
        labels = of.labels if of.own is not None else asked.labels
        if not labels or len(labels) != len(found_K):
            raise names_unknown(of)
        best = found_K.topk(min(k, int((found_K > 0).sum()), len(labels)))
        return [Answer(labels[n], p) for p, n in zip(best.values.tolist(), best.indices.tolist(), strict=True)]

    def ranking(self, ranked: int | None = None, first_word_twice: bool | None = None) -> Bundle:
        """The same model, whose head ranks a list of answers in another way. None: as it is.

        Args:
            ranked: answers of the list that are read to their end: those that begin most likely.
            first_word_twice: an answer's first word counts twice, as in the public code (`AnswerDecoder.rank`).

        Raises:
            TriviumError: the model has no head that ranks a list.
        """
        return replace(self, head_config=ranked_by(self.head_config, ranked, first_word_twice))

    def _stacked(self, pictures: Pictures) -> tuple[Tensor, Tensor | None]:
        """Pixels, and sizes where a family that takes pictures of any size pads them."""
        pictures = listed(pictures)
        return padded([self._pixels(one, pictures) for one in pictures])

    def _task_texts(
        self, texts: Strings, second_texts: Strings | None, asked: Asked
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        assert self.tokenizer is not None
        first = [texts] if isinstance(texts, str) else list(texts)
        second = [second_texts] if isinstance(second_texts, str) else second_texts
        if second is not None and len(second) != len(first):
            raise TriviumError(f"{len(first)} texts and {len(second)} second texts do not pair up: give as many")
        told = asked.segments
        pairs = [self.tokenizer.encode_task(one, None if second is None else second[n], asked.max_length, told)
                 for n, one in enumerate(first)]  # fmt: skip
        ids, mask, segments = self.tokenizer.pad_task(pairs)
        return ids, mask, segments if told else None

    def save(
        self,
        folder: str | Path,
        weights: Mapping[str, Tensor] | None = None,
        shard_bytes: int = SHARD_BYTES,
        head_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a model folder: beside, then renamed into place. `folder` must not exist, or be empty.

        Args:
            weights: written in place of the model's own: a copy of them, say, while the model trains on.
            head_weights: likewise in place of the head's.
            shard_bytes: weights that take more are written in several files with an index.

        Raises:
            TriviumError: the folder holds something, or cannot be written; nothing half-written stays.
        """
        weights = self.model.state_dict() if weights is None else weights
        with written_beside(Path(folder)) as beside:
            model_folder.write(beside, self, weights, shard_bytes, head_weights)

    @property
    def _patch(self) -> int:
        """Pixels on a side."""
        patch: int = self.model.config.patch_size  # type: ignore[union-attr, assignment]
        return patch

    def _normalised(self, pixels_BCHW: Tensor) -> Tensor:
        return normalised(pixels_BCHW, self.transform, next(self.model.parameters()))

    def _pixels(self, picture: Picture | Tensor, given: Any) -> Tensor:
        """uint8 or float [3, H, W] of one picture."""
        return self._read(picture, given, self.transform)

    def _read(self, picture: Picture | Tensor, given: Any, read: Callable[[Any], Any]) -> Any:
        """What `read` makes of one of the pictures that were given; of a tensor, its row as it is."""
        if isinstance(given, Tensor):
            check_sides(given, self._patch)
            return picture
        return read_picture(picture, read)

    def _joined(self, parts: list[Encoded], nothing: str) -> Encoded:
        if not parts:
            raise TriviumError(f"{nothing}: the list is empty")
        with _evaluating(self.model):
            return Encoded.joined(parts).settled()

    def _placed(self, encoded: Encoded) -> Encoded:
        """With a place in the space that pictures and texts share only where something trained the way there."""
        return encoded if no_cosine(self.untrained) is None else encoded.unprojected()

    def _refuse(self, why: str | None, what: str) -> None:
        """Raises TriviumError where there is a reason why the model cannot say something."""
        if why is not None:
            raise TriviumError(f"{why}, so it cannot say {what}: train it, as by `trivium finetune retrieval`")

    def _able(self, ability: type[Ability], lacking: str) -> Ability:
        """The model as one that has this ability. Raises TriviumError where its family has not."""
        if not isinstance(self.model, ability):
            raise TriviumError(f"this model ({self.family}) {lacking}: use one of a family that does")
        return self.model


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards the mode that was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
