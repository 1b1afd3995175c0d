"""UniT: Multimodal Multitask Learning with a Unified Transformer (Hu & Singh, ICCV 2021, arXiv 2102.10772).

A ResNet and a transformer read the picture, a BERT reads the words, and one decoder asks both with queries that each
task has of its own; on top stands a head per task. Easy to get wrong:

* positions are added to queries and keys in every layer, never to values; the encoder's output is added to its input
  once more, after the last layer;
* the token of the task stands first in either encoder, without a position, after BERT's embedding norm, and is taken
  off again before the decoder;
* all but VQA's decoder read of a text its class token alone, so that for tasks of text the memory has one position and
  the queries are inert: without dropout one of them gives what all would;
* a head of labels reads the first query of the last layer; a head of detection every query, in training of every layer;
* padded pictures give what each gives alone (`layers/resnet.py`).

How it is used, by name of a task in `config.tasks`:

    image = model.encode_image(pixels_BCHW, sizes_B2, "vqav2")
    text = model.encode_text(ids_BT, mask_BT, segments_BT, "vqav2")
    hidden_LBQD = model.decode("vqav2", image, text)          # detection: all layers; labels: [1, B, 1, D]
    logits_BK = model.heads["vqav2"](hidden_LBQD[-1, :, 0])   # or all of it: model.label("vqav2", image, text)
    found = model.heads["coco"](model.decode("coco", image))  # Detections: logits_LBQK, boxes_LBQ4

B batch, H height, W width, N image tokens, T text tokens, S positions of the decoder's memory, L decoder layers,
Q queries, P points, E width of the image encoder, D width of the decoder, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trivium.errors import TriviumError
from trivium.layers.embeddings import sines
from trivium.layers.heads import MaskedHead
from trivium.layers.resnet import ResNet
from trivium.models.bert import Bert, BertConfig
from trivium.models.encoded import Encoded, Found
from trivium.models.unit_heads import DetectionHead, likeliest
from trivium.models.unit_image import ImageEncoder
from trivium.models.unit_transformer import Decoder, EncoderBlock, TaskTokens


@dataclass(frozen=True)
class UnitTask:
    """One task of a model. What trains and measures it is elsewhere."""

    name: str
    kind: Literal["detection", "labels"]
    reads: Literal["image", "text", "both"]
    num_labels: int  # of detection: the largest category id + 1; the class "no object" comes on top
    number: int  # of its task tokens: their row in the tables of a released file, in which no two share one
    num_queries: int = 25
    num_attributes: int | None = None  # of a detected object, with number 0 for none; None: no such head
    text: Literal["class", "all"] = "class"  # which of the text's tokens the decoder reads
    gives: Literal["class", "answers"] = "class"  # of labels: one right class, or answers that are more or less right
    max_length: int | None = None  # tokens of its texts that are read; None: as many as there are positions


PUBLISHED_TASKS = (
    UnitTask("coco", "detection", "image", 91, 0, 100),
    UnitTask("vg", "detection", "image", 1601, 1, 100, num_attributes=401),
    UnitTask("vqav2", "labels", "both", 3129, 3, text="all", gives="answers", max_length=25),
    UnitTask("snli_ve", "labels", "both", 3, 9, max_length=25),
    UnitTask("qnli", "labels", "text", 2, 5, max_length=128),
    UnitTask("mnli", "labels", "text", 3, 6, max_length=128),
    UnitTask("sst2", "labels", "text", 2, 7, max_length=128),
    UnitTask("qqp", "labels", "text", 2, 8, max_length=128),
)


@dataclass(frozen=True)
class UnitConfig:
    """The published model of eight tasks by default: 200,917,308 parameters, without BERT's unused pooler."""

    tasks: tuple[UnitTask, ...] = PUBLISHED_TASKS
    decoder: Literal["shared", "separate"] = "shared"  # one for all tasks, or one for each
    width: int = 768  # of the decoder
    num_heads: int = 8  # of the decoder and of the image encoder
    mlp_width: int = 2048  # of both
    decoder_layers: int = 6
    image_width: int = 256
    image_layers: int = 6
    backbone_widths: tuple[int, ...] = (64, 128, 256, 512)  # of the 3 x 3 convolutions, stage by stage
    backbone_blocks: tuple[int, ...] = (3, 4, 6, 3)
    bottleneck: bool = True  # 1 x 1, 3 x 3, 1 x 1 to four times the width; False: 3 x 3, 3 x 3
    backbone_norm: Literal["frozen", "group"] = "frozen"  # batch norm of loaded weights, or GroupNorm
    backbone_eps: float = 1e-5  # 0 in the torchvision of the paper's time, 1e-5 in DETR and today
    dilated: bool = True  # the last stage keeps its resolution (DC5)
    text_width: int = 768
    text_heads: int = 12
    text_mlp_width: int = 3072
    text_layers: int = 12  # 0: no text encoder, where no task reads one
    vocab_size: int = 30522
    max_length: int = 512  # text positions
    num_segments: int = 2
    pad_id: int = 0
    text_eps: float = 1e-12  # of every LayerNorm of the text encoder, and of the heads of labels
    eps: float = 1e-5  # of those of image encoder and decoder
    dropout: float = 0.1
    num_task_tokens: int = 256  # rows of a released table of task tokens; 0: no task tokens
    residual: bool = True  # the encoder's input is added to its output (False: DETR)
    place_temperature: float = 10000.0  # of the sines that tell places; less is finer
    place_scale: float = 1.0  # what they are multiplied by
    # Each query of detection has a box of its own, which its head corrects (Conditional DETR's idea, Meng et al., ICCV
    # 2021). Published queries are to find their places by themselves, for which small data and minutes do not suffice.
    anchored: bool = False
    attribute_width: int = 256  # of the class embedding that the head of attributes reads; its inside is twice that

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(UnitTask(**t) if isinstance(t, Mapping) else t for t in self.tasks))
        for field in ("backbone_widths", "backbone_blocks"):  # lists, where they come from JSON
            object.__setattr__(self, field, tuple(getattr(self, field)))
        names = [task.name for task in self.tasks]
        numbers = [task.number for task in self.tasks]
        for task in self.tasks:
            wrong = self._wrong(task)
            if names.count(task.name) > 1:
                wrong = "there are two of this name"
            elif self.num_task_tokens and numbers.count(task.number) > 1:
                wrong = f"number {task.number} is another task's too"
            if wrong:
                raise TriviumError(f"the task {task.name!r} of a UniT cannot be built: {wrong}")

    def _wrong(self, task: UnitTask) -> str | None:
        if not task.name or "." in task.name:
            return "its name must be of at least one character and hold no dot"
        if hasattr(nn.ModuleDict(), task.name):
            return "torch keeps this name for itself: choose another"
        if task.kind == "detection" and task.reads != "image":
            return f"it detects, so it reads the image alone, not {task.reads!r}"
        if task.kind != "detection" and task.num_attributes is not None:
            return "attributes are of detected objects, and it detects none"
        if task.reads != "image" and not self.text_layers:
            return "it reads texts, and this model has no text encoder (text_layers is 0)"
        if self.num_task_tokens and not 0 <= task.number < self.num_task_tokens:
            return f"number {task.number} has no row among {self.num_task_tokens} task tokens"
        return None

    @classmethod
    def of_size(cls, size: str, **changes: Any) -> UnitConfig:
        """`size` is "tiny", "small" or "base" (the published one), with single fields changed."""
        return replace(SIZES[size], **changes)

    def readers(self, side: Literal["image", "text"]) -> list[UnitTask]:
        """Tasks that read pictures, or texts."""
        return [task for task in self.tasks if task.reads in (side, "both")]

    def make_tokens(self, side: Literal["image", "text"], width: int) -> TaskTokens | None:
        readers = [task.name for task in self.readers(side)]
        return TaskTokens(readers, self.num_task_tokens - len(readers), width) if self.num_task_tokens else None

    @property
    def patch_size(self) -> int:
        """Pixels that the sides of a picture must be multiples of: any size will do."""
        return 1

    @property
    def has_published_places(self) -> bool:
        """Whether places and anchors are as in DETR, which has none of the latter."""
        return (self.place_temperature, self.place_scale, self.anchored) == (10000.0, 1.0, False)

    @property
    def text_encoder(self) -> BertConfig:
        return BertConfig(
            width=self.text_width, num_heads=self.text_heads, mlp_width=self.text_mlp_width,
            num_layers=self.text_layers, vocab_size=self.vocab_size, max_length=self.max_length,
            num_segments=self.num_segments, pad_id=self.pad_id, eps=self.text_eps, dropout=self.dropout, pooler=False,
        )  # fmt: skip


SIZES = {
    "tiny": UnitConfig(
        width=128, num_heads=4, mlp_width=512, decoder_layers=3, image_width=128, image_layers=2,
        backbone_widths=(32, 64, 128, 256), backbone_blocks=(1, 1, 1, 1), bottleneck=False, backbone_norm="group",
        text_width=128, text_heads=4, text_mlp_width=512, text_layers=3, vocab_size=4096, max_length=64, dropout=0.0,
        place_temperature=20.0, place_scale=4.0, anchored=True,
    ),
    "small": UnitConfig(
        width=256, mlp_width=1024, decoder_layers=4, image_layers=4,
        backbone_blocks=(2, 2, 2, 2), bottleneck=False, backbone_norm="group",
        text_width=384, text_mlp_width=1536, text_layers=6, max_length=128,
        place_temperature=20.0, place_scale=4.0, anchored=True,
    ),
    "base": UnitConfig(),
}  # fmt: skip


class Unit(nn.Module):
    """Both encoders, the decoder or decoders, queries and heads of every task."""

    def __init__(self, config: UnitConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.image = ImageEncoder(
            ResNet(
                config.backbone_widths, config.backbone_blocks, config.bottleneck, config.backbone_norm,
                config.backbone_eps, config.dilated,
            ),
            config.image_width,
            config.make_tokens("image", config.image_width),
            [EncoderBlock(config.image_width, config.num_heads, config.mlp_width, config.eps, config.dropout)
             for _ in range(config.image_layers)],
            place_temperature=config.place_temperature, place_scale=config.place_scale, residual=config.residual,
        )  # fmt: skip
        same = config.image_width == width
        self.image_to_decoder = nn.Identity() if same else nn.Linear(config.image_width, width)
        self.image_places = nn.Identity() if same else nn.Linear(config.image_width, width)
        self.text = None
        if config.text_layers:
            self.text = Bert(config.text_encoder)
            self.text_task_tokens = config.make_tokens("text", config.text_width)
            self.text_to_decoder = nn.Linear(config.text_width, width)
            self.text_places = nn.Linear(config.text_width, width)
        names = [task.name for task in config.tasks] if config.decoder == "separate" else ["shared"]
        self.decoders = nn.ModuleDict({
            name: Decoder(config.decoder_layers, width, config.num_heads, config.mlp_width, config.eps, config.dropout)
            for name in names
        })  # fmt: skip
        self.queries = nn.ModuleDict({task.name: nn.Embedding(task.num_queries, width) for task in config.tasks})
        self.heads = nn.ModuleDict({
            task.name: DetectionHead(width, task.num_labels, task.num_attributes, config.attribute_width,
                                     task.num_queries if config.anchored else 0)
            if task.kind == "detection"
            else MaskedHead(width, task.num_labels, config.text_eps)
            for task in config.tasks
        })  # fmt: skip
        self.dropout = nn.Dropout(config.dropout)  # before a head of labels

    def config_dict(self) -> dict[str, Any]:
        """What a model folder's config.json holds beside the family."""
        return asdict(self.config)

    def blocks(self) -> list[nn.Module]:
        """Every transformer block, for compilation and sharding block by block."""
        decoders: Iterable[Any] = self.decoders.values()
        text = [] if self.text is None else self.text.blocks()
        return [*self.image.blocks, *text, *(block for decoder in decoders for block in decoder.blocks)]

    def task(self, name: str) -> UnitTask:
        """Raises TriviumError where there is none of this name."""
        for task in self.config.tasks:
            if task.name == name:
                return task
        known = ", ".join(task.name for task in self.config.tasks)
        raise TriviumError(f"this UniT has no task {name!r}: it has {known}")

    def encode_image(self, pixels_BCHW: Tensor, sizes_B2: Tensor | None = None, task: str | None = None) -> Encoded:
        """Normalised pixels, float [B, 3, H, W], of any size -> `states` [B, N, D] as the decoder reads them.

        Args:
            sizes_B2: (height, width) of each picture, which begins at the top left; what lies beyond has no effect.
                None: no padding. On any device; where it is on CPU nothing waits for it.
            task: whose token is read with it; None: of the first task that reads pictures.
        """
        states, places, mask_BN = self.image(pixels_BCHW, sizes_B2, self._reader("image", task).name)
        places_BND = self.image_places(places).expand(len(states), -1, -1)
        return Encoded(self.image_to_decoder(states), mask_BN, nn.Identity(), None, places=places_BND, mean=True)

    def places_of(self, points_P2: Tensor) -> Tensor:
        """[P, D]: what tells the decoder where points of a picture are. points_P2: (x, y) as shares of its sides.

        A feature map counts its places from 1, so each has the places of its far corner.
        """
        half, temperature = self.config.image_width // 2, self.config.place_temperature
        along = [sines(points_P2[:, axis], half, temperature) for axis in (1, 0)]
        places_PD: Tensor = self.image_places(self.config.place_scale * torch.cat(along, dim=1))
        return places_PD

    def encode_text(
        self,
        ids_BT: Tensor,
        mask_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        task: str | None = None,
    ) -> Encoded:
        """Token ids, int64 [B, T] -> `states` [B, T, D], or [B, 1, D] of a task that reads the class token alone.

        Args:
            mask_BT: bool, True = a real token. None attends pads too.
            task: whose token is read with it; None: of the first task that reads texts, and all tokens are given.
        """
        reader = self._reader("text", task)
        assert self.text is not None
        x_BTE = self.text.embeddings(ids_BT, segments_BT)
        mask, first = mask_BT, 0
        if self.text_task_tokens is not None:
            first = 1
            x_BTE = self.text_task_tokens.before(x_BTE, reader.name)
            mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        T = ids_BT.shape[1]
        rows = None
        if task is not None and reader.text == "class":  # the last block at the class token alone
            rows, T, mask_BT = torch.full((len(ids_BT), 1), first, device=ids_BT.device), 1, None
        x_BTE = self.text.encoder(x_BTE, mask, rows, pads=task is None)  # the decoder reads none
        states = self.text_to_decoder(x_BTE if rows is not None else x_BTE[:, first:])
        places_BTD = self.text_places(self.text.embeddings.position.weight[:T]).expand(len(ids_BT), -1, -1)
        return Encoded(states, mask_BT, nn.Identity(), None, places=places_BTD)

    def decode(self, task: str, image: Encoded | None, text: Encoded | None = None, last: bool = False) -> Tensor:
        """What the queries of a task found, after the final norm: [L, B, Q, D] of detection ([1, B, Q, D] with `last`),
        [1, B, 1, D] of labels, whose head reads no more. `image` and `text`: those that it reads, encoded for it."""
        reader = self.task(task)
        sides = [side for side, other in ((image, "text"), (text, "image")) if reader.reads != other]
        assert all(side is not None and side.places is not None for side in sides), f"{task} reads {reader.reads}"
        read: list[Any] = [(side.states, side.places, side.mask) for side in sides if side is not None]
        if reader.reads != "image" and reader.text == "class":
            read[-1] = (read[-1][0][:, :1], read[-1][1][:, :1], None)
        memory_BSD = torch.cat([states for states, _, _ in read], dim=1)
        placed_BSD = memory_BSD + torch.cat([places for _, places, _ in read], dim=1)
        mask_BS = None
        if any(mask is not None for _, _, mask in read):
            every = [states.new_ones(states.shape[:2], dtype=torch.bool) if mask is None else mask
                     for states, _, mask in read]  # fmt: skip
            mask_BS = torch.cat(every, dim=1)
        queries: Any = self.queries[task]
        query_QD = queries.weight
        labels = reader.kind == "labels"
        if labels and memory_BSD.shape[1] == 1 and not (self.training and self.config.dropout):
            query_QD = query_QD[:1]  # the others would find the same
        decoder = self.decoders[task if self.config.decoder == "separate" else "shared"]
        hidden_LBQD: Tensor = decoder(
            query_QD, memory_BSD, placed_BSD, mask_BS, last or labels, 1 if labels else len(query_QD)
        )
        return hidden_LBQD

    def label(self, task: str, image: Encoded | None, text: Encoded | None = None) -> Tensor:
        """Logits [B, K] of a task of labels."""
        assert self.task(task).kind == "labels", f"{task} detects"
        logits_BK: Tensor = self.heads[task](self.dropout(self.decode(task, image, text)[0, :, 0]))
        return logits_BK

    @torch.no_grad()
    def detect(self, pixels_BCHW: Tensor, sizes_B2: Tensor | None = None, task: str | None = None) -> Found:
        """Objects in pictures: of each query its likeliest class, "no object" left out (DETR's way to COCO's mAP).

        task: None: the first that detects.
        """
        task = task or next((t.name for t in self.config.tasks if t.kind == "detection"), "detection")
        if self.task(task).kind != "detection":
            raise TriviumError(f"the task {task!r} detects nothing: name one that does")
        head: Any = self.heads[task]
        return likeliest(head(self.decode(task, self.encode_image(pixels_BCHW, sizes_B2, task), last=True)), head)

    def _reader(self, kind: Literal["image", "text"], name: str | None) -> UnitTask:
        """A task that reads pictures or texts."""
        if name is None:
            for task in self.config.readers(kind):
                return task
            raise TriviumError(f"no task of this UniT reads {kind}s")
        task = self.task(name)
        if task.reads not in (kind, "both"):
            raise TriviumError(f"the task {name!r} reads no {kind}s")
        return task
