"""A trained model of any family with a head for one task.

What the head reads is one vector of a sample:

    text           the pooled text
    image          the pooled picture
    fused          the class token of the multimodal encoder, of a model that reads both together (FLAVA, section 4.2)
    concatenated   pooled picture and pooled text side by side, of a model that does not (FLAVA, appendix B.2, for CLIP)

Of a text with two pictures these vectors stand side by side for both. Two heads of ALBEF read more (albef_heads.py):

    states         every state of the fused text, for whoever writes an answer from them
    two_pictures   text and both pictures, through the model's own fusion

B batch, P pictures (B, or 2 B: all the first ones, then all the second), C channels, H height, W width, T text tokens,
D width of what the head reads, K outputs, R answers to some of the questions, M words of them that are asked for,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trivium.layers.heads import TaskHead
from trivium.models.albef import Albef
from trivium.models.albef_heads import AnswerDecoder, TwoPictures
from trivium.models.bert import Bert, BertConfig
from trivium.models.encoded import Encoded, EncodesImage, EncodesText, Fuses
from trivium.models.flava import Flava
from trivium.models.unit import Unit

Reads = Literal["text", "image", "fused", "concatenated", "states", "two_pictures"]
Gives = Literal["class", "number", "answers", "text"]


@dataclass(frozen=True)
class HeadConfig:
    """What of a fine-tuned model its trained model does not say."""

    task: str  # its name
    reads: Reads
    gives: Gives  # one right class, a number, answers that are more or less right, or answers in words
    width: int  # of what it reads
    num_outputs: int
    hidden: int | None = None  # width of its inner layer; None: a linear map alone
    activation: Literal["tanh", "gelu", "relu"] = "tanh"
    dropout: float = 0.1
    center: float = 0.0  # a number is output x scale + center
    scale: float = 1.0
    blocks: BertConfig | None = None  # of a head that has some of its own
    num_pictures: int = 1
    ranked: int = 128  # answers of a list that a writer reads to their end: those that begin most likely
    first_word_twice: bool = False  # a writer ranks as the public code does, which counts an answer's first word twice

    def __post_init__(self) -> None:
        if isinstance(self.blocks, Mapping):  # as a file has it
            object.__setattr__(self, "blocks", BertConfig(**self.blocks))

    def build(self) -> TaskHead | AnswerDecoder:
        if self.blocks is None:
            return TaskHead(self.width, self.hidden, self.num_outputs, self.activation, self.dropout)
        if self.gives == "text":
            return AnswerDecoder(self.blocks)
        return TwoPictures(self.blocks, self.hidden, self.num_outputs, self.activation, self.dropout)


def tells_segments_apart(model: nn.Module) -> bool:
    """Whether two texts go in as one sequence with a [SEP] and a segment for each."""
    return isinstance(model, Flava | Bert) and model.config.num_segments > 1


class FineTuned(nn.Module):
    """Model and head.

    answers_KT: the list that a writer ranks, as tokens (see `AnswerDecoder`). It is no part of the weights.
    """

    answers_KT: Tensor | None

    def __init__(
        self, backbone: nn.Module, head: nn.Module, config: HeadConfig, answers_KT: Tensor | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.config = config
        self.register_buffer("answers_KT", answers_KT, persistent=False)

    def config_dict(self) -> dict[str, Any]:
        """Of the head."""
        return asdict(self.config)

    def forward(
        self,
        pixels_PCHW: Tensor | None,
        ids_BT: Tensor | None,
        mask_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        sizes_P2: Tensor | None = None,
    ) -> Tensor:
        """Logits or numbers [B, K]; of a writer the log-likelihood of each answer of the list, -inf of those that it
        does not read. Pixels are normalised.

        sizes_P2: (height, width) of each picture, of a UniT, which reads no padding; None: nothing is padded.
        """
        if isinstance(self.head, AnswerDecoder):
            assert self.answers_KT is not None, "a writer ranks a list of answers"
            fused, config = self.fused(pixels_PCHW, ids_BT, mask_BT), self.config
            return self.head.rank(fused, self.answers_KT, config.ranked, config.first_word_twice)
        if isinstance(self.head, TwoPictures):
            assert isinstance(self.backbone, Albef) and pixels_PCHW is not None and ids_BT is not None
            tokens_PND = self.backbone.encode_image(pixels_PCHW).tokens
            text = self.backbone.encode_text(ids_BT, mask_BT, pads=False)
            return self.head.judge(self.backbone.fusion, text, tokens_PND)
        return self.head(read(self.backbone, self.config.reads, pixels_PCHW, ids_BT, mask_BT, segments_BT, sizes_P2))

    def fused(self, pixels_BCHW: Tensor | None, ids_BT: Tensor | None, mask_BT: Tensor | None) -> Encoded:
        """What a writer reads."""
        assert isinstance(self.backbone, Albef) and pixels_BCHW is not None and ids_BT is not None
        text = self.backbone.encode_text(ids_BT, mask_BT, pads=False)
        return self.backbone.fuse(self.backbone.encode_image(pixels_BCHW), text, pads=False)

    def written(self, fused: Encoded, ids_RT: Tensor, row_R: Tensor, places_M: Tensor) -> Tensor:
        """Logits [M, V] of the next word at some places of given answers, places in [R * T].

        row_R: int64, the question of each answer.
        """
        assert isinstance(self.head, AnswerDecoder)
        states_RTD, _ = self.head.states(ids_RT, self.head.read(fused).of_rows(row_R))
        return self.head.predict_words(states_RTD.flatten(0, 1)[places_M])

    def answers(self, outputs_BK: Tensor) -> Tensor:
        """What is answered: numbers in their own unit [B, 1], probabilities of classes or of the answers of a list
        [B, K], or how right each answer is [B, K]."""
        outputs_BK = outputs_BK.float()
        if self.config.gives == "number":
            return outputs_BK * self.config.scale + self.config.center
        return outputs_BK.sigmoid() if self.config.gives == "answers" else outputs_BK.softmax(-1)


def read(
    model: nn.Module,
    reads: Reads,
    pixels_PCHW: Tensor | None,
    ids_BT: Tensor | None,
    mask_BT: Tensor | None,
    segments_BT: Tensor | None,
    sizes_P2: Tensor | None = None,
) -> Tensor:
    """The vector of each sample, [B, D]. Of the last blocks no more is computed than is read. sizes_P2: see
    `FineTuned.forward`."""
    assert sizes_P2 is None or isinstance(model, Unit), "only UniT reads padded pictures as they are alone"
    class_alone = 1 if reads != "fused" else None  # of families whose class token stands first
    images: list[Encoded] = []
    text = None
    if reads != "text":
        assert isinstance(model, EncodesImage) and pixels_PCHW is not None
        image = (
            model.encode_image(pixels_PCHW, rows=class_alone)
            if isinstance(model, Flava)
            else model.encode_image(pixels_PCHW, sizes_P2)
            if isinstance(model, Unit)
            else model.encode_image(pixels_PCHW)
        )
        images = [image] if ids_BT is None else image.split(len(ids_BT))
    if reads != "image":
        assert isinstance(model, EncodesText) and ids_BT is not None
        text = (
            model.encode_text(ids_BT, mask_BT, segments_BT, class_alone, pads=False)
            if isinstance(model, Flava | Bert)
            else model.encode_text(ids_BT, mask_BT, pads=False)
            if isinstance(model, Albef)
            else model.encode_text(ids_BT, mask_BT)
        )
    if text is None:
        return images[0].pooled
    if not images or reads == "concatenated":
        return torch.cat([*(image.pooled for image in images), text.pooled], dim=-1)
    assert isinstance(model, Fuses)
    return torch.cat([model.fuse(image, text, rows=1).pooled for image in images], dim=-1)
