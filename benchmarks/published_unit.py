"""UniT written out from its description, as plainly as can be, in the layout of the released checkpoints.

torch's MultiheadAttention and BatchNorm arithmetic, transformers' BERT, one picture at a time, no trick: what Trivium's
UniT is compared with, and whose state dict stands for the files that cannot be downloaded here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

from trivium.convert.unit import MMF_NAMES
from trivium.models.unit import UnitConfig, UnitTask


class FrozenNorm(nn.Module):
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            buffer.view(1, -1, 1, 1) for buffer in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


class Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, dilation: int, eps: float, downsample: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), FrozenNorm(width, eps)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = FrozenNorm(width, eps)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), FrozenNorm(4 * width, eps)
        self.downsample = None
        if downsample:
            shortcut = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, FrozenNorm(4 * width, eps))

    def forward(self, x: Tensor) -> Tensor:
        kept = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return (self.bn3(self.conv3(x)) + kept).relu()


class Body(nn.Module):
    def __init__(self, config: UnitConfig) -> None:
        super().__init__()
        eps, widths = config.backbone_eps, config.backbone_widths
        self.conv1, self.bn1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False), FrozenNorm(widths[0], eps)
        channels = widths[0]
        self.num_stages = len(widths)
        for n, (width, count) in enumerate(zip(widths, config.backbone_blocks, strict=True), start=1):
            dilated = config.dilated and n == self.num_stages
            blocks = [Bottleneck(channels, width, 1 if n == 1 or dilated else 2, 1, eps, True)]
            blocks += [Bottleneck(4 * width, width, 1, 2 if dilated else 1, eps, False) for _ in range(count - 1)]
            self.add_module(f"layer{n}", nn.Sequential(*blocks))
            channels = 4 * width

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        for n in range(1, self.num_stages + 1):
            x = getattr(self, f"layer{n}")(x)
        return x


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        x = self.norm1(x + self.self_attn(x + pos, x + pos, x)[0])
        return self.norm2(x + self.linear2(self.linear1(x).relu()))


class DecoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, query: Tensor, memory: Tensor, pos: Tensor, hidden: Tensor) -> Tensor:
        x = self.norm1(x + self.self_attn(x + query, x + query, x)[0])
        x = self.norm2(x + self.multihead_attn(x + query, memory + pos, memory, key_padding_mask=hidden)[0])
        return self.norm3(x + self.linear2(self.linear1(x).relu()))


class PlainDecoder(nn.Module):
    def __init__(self, config: UnitConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(config.width, config.num_heads, config.mlp_width) for _ in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, query: Tensor, memory: Tensor, pos: Tensor, hidden: Tensor) -> Tensor:
        x, outputs = torch.zeros_like(query), []
        for layer in self.layers:
            x = layer(x, query, memory, pos, hidden)
            outputs.append(self.norm(x))
        return torch.stack(outputs)


class Holder(nn.Module):
    """Modules by name, for a layout of names."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class PlainUnit(nn.Module):
    """The whole model. Dropout is left out."""

    def __init__(self, config: UnitConfig) -> None:
        super().__init__()
        self.config = config
        width, E, tokens = config.width, config.image_width, config.num_task_tokens
        transformer = Holder(
            encoder=Holder(layers=nn.ModuleList(
                EncoderLayer(E, config.num_heads, config.mlp_width) for _ in range(config.image_layers)
            )),
            enc2dec_proj=nn.Identity() if E == width else nn.Linear(E, width),
            pos_embed_proj=nn.Identity() if E == width else nn.Linear(E, width),
        )  # fmt: skip
        shared = PlainDecoder(config) if config.decoder == "shared" else None
        if shared is not None:
            transformer.decoder = shared
        decoders, queries, classifiers = (self.by_kind() for _ in range(3))
        if tokens:
            transformer.task_embeddings_enc = nn.Embedding(tokens, E)
            self.task_embeddings_lang = nn.Embedding(tokens, config.text_width)
        self.class_embeds, self.bbox_embeds, self.det_losses = (nn.ModuleDict() for _ in range(3))
        for task in config.tasks:
            kind, dataset = MMF_NAMES[task.name]
            decoders[kind][dataset] = shared or PlainDecoder(config)
            queries[kind][dataset] = nn.Embedding(task.num_queries, width)
            if task.kind == "detection":
                self.class_embeds[dataset] = nn.Linear(width, task.num_labels + 1)
                sizes = (width, width, width, 4)
                self.bbox_embeds[dataset] = Holder(layers=nn.ModuleList(map(nn.Linear, sizes[:-1], sizes[1:])))
                self.det_losses[dataset] = Holder()
                self.det_losses[dataset].register_buffer("empty_weight", torch.ones(task.num_labels + 1))
                if task.num_attributes is not None:
                    inner = config.attribute_width
                    self.det_losses[dataset].attribute_head = Holder(
                        cls_embed=nn.Embedding(task.num_labels + 1, inner),
                        attr_linear1=nn.Linear(width + inner, 2 * inner),
                        attr_linear2=nn.Linear(2 * inner, task.num_attributes),
                    )
            else:
                transform = Holder(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, 1e-12))
                classifiers[kind][dataset] = nn.Sequential(transform, nn.Linear(width, task.num_labels))
        transformer.decoders = decoders
        body = Body(config)
        self.unit_base_model = Holder(
            backbone=nn.Sequential(Holder(body=body)),
            input_proj=nn.Conv2d(4 * config.backbone_widths[-1], E, 1),
            transformer=transformer,
            query_embeds=queries,
        )
        self.classifiers = classifiers
        make_config: Any = transformers.BertConfig
        bert = transformers.BertModel(make_config(
            vocab_size=config.vocab_size, hidden_size=config.text_width, num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_heads, intermediate_size=config.text_mlp_width,
            max_position_embeddings=config.max_length, attn_implementation="eager",
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ))  # fmt: skip
        self.bert_model = Holder(module=bert, embeddings=bert.embeddings)
        self.bert_projection = nn.Linear(config.text_width, width)
        self.bert_pos_projection = nn.Linear(config.text_width, width)

    @staticmethod
    def by_kind() -> Any:
        return nn.ModuleDict({kind: nn.ModuleDict() for kind in ("detection", "vl", "glue")})

    def official_state(self) -> dict[str, Tensor]:
        """As a file has it."""
        state = dict(self.state_dict())
        positions = torch.arange(self.config.max_length)[None]
        return state | {f"bert_model.{part}embeddings.position_ids": positions for part in ("", "module.")}

    def forward(
        self,
        task: UnitTask,
        pictures: list[Tensor] | None,  # [1, 3, H, W] each, of any size
        ids_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
    ) -> Tensor:
        """[L, B, Q, D], one sample at a time."""
        rows = len(pictures) if pictures is not None else len(ids_BT)  # type: ignore[arg-type]
        found = []
        for row in range(rows):
            sides = []
            if task.reads != "text":
                assert pictures is not None
                sides.append(self.image(task, pictures[row]))
            if task.reads != "image":
                assert ids_BT is not None and mask_BT is not None and segments_BT is not None
                sides.append(self.text(task, *(part[row : row + 1] for part in (ids_BT, mask_BT, segments_BT))))
            memory, pos, hidden = (torch.cat(parts, dim=1) for parts in zip(*sides, strict=True))
            kind, dataset = MMF_NAMES[task.name]
            base: Any = self.unit_base_model
            query = base.query_embeds[kind][dataset].weight[None]
            found.append(base.transformer.decoders[kind][dataset](query, memory, pos, hidden))
        return torch.cat(found, dim=1)

    def image(self, task: UnitTask, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        base: Any = self.unit_base_model
        features = base.input_proj(base.backbone[0].body(pixels))
        height, width = features.shape[2:]
        source = features.flatten(2).transpose(1, 2)
        pos = sine(height, width, source.shape[2], base.input_proj.weight)[None]
        x, x_pos = source, pos
        if self.config.num_task_tokens:
            token = base.transformer.task_embeddings_enc.weight[task.number][None, None]
            x, x_pos = torch.cat([token, source], 1), torch.cat([torch.zeros_like(token), pos], 1)
        for layer in base.transformer.encoder.layers:
            x = layer(x, x_pos)
        memory = x[:, 1:] if self.config.num_task_tokens else x
        memory = memory + source if self.config.residual else memory
        nothing = torch.zeros(1, height * width, dtype=torch.bool, device=pixels.device)
        return base.transformer.enc2dec_proj(memory), base.transformer.pos_embed_proj(pos), nothing

    def text(self, task: UnitTask, ids: Tensor, mask: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bert: Any = self.bert_model.module
        x, real = bert.embeddings(input_ids=ids, token_type_ids=segments), mask
        if self.config.num_task_tokens:
            x = torch.cat([self.task_embeddings_lang.weight[task.number][None, None], x], 1)
            real = torch.cat([torch.ones(1, 1, dtype=torch.bool), mask], 1)
        added = torch.zeros(x.shape[:2], dtype=x.dtype).masked_fill(~real, -1e9)[:, None, None]
        x = bert.encoder(x, attention_mask=added).last_hidden_state
        x = self.bert_projection(x[:, 1:] if self.config.num_task_tokens else x)
        pos = self.bert_pos_projection(bert.embeddings.position_embeddings.weight[: ids.shape[1]])[None]
        hidden = ~mask
        return (x[:, :1], pos[:, :1], hidden[:, :1]) if task.text == "class" else (x, pos, hidden)

    def logits(self, task: UnitTask, hidden_LBQD: Tensor) -> Tensor:
        kind, dataset = MMF_NAMES[task.name]
        head: Any = self.classifiers[kind][dataset]
        x = F.gelu(head[0].dense(hidden_LBQD[-1, :, 0]))
        return head[1](head[0].LayerNorm(x))

    def detected(self, task: UnitTask, hidden_LBQD: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and boxes of every layer."""
        dataset = MMF_NAMES[task.name][1]
        x: Tensor = hidden_LBQD
        layers: Any = self.bbox_embeds[dataset].layers
        for number, layer in enumerate(layers):
            x = layer(x).relu() if number < 2 else layer(x).sigmoid()
        return self.class_embeds[dataset](hidden_LBQD), x

    def attributes(self, task: UnitTask, hidden: Tensor, classes: Tensor) -> Tensor:
        head: Any = self.det_losses[MMF_NAMES[task.name][1]].attribute_head
        return head.attr_linear2(head.attr_linear1(torch.cat([hidden, head.cls_embed(classes)], -1))).relu()


def sine(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """DETR's positions, [height * width, channels], with its cumulative sums."""
    half = channels // 2
    real = torch.ones(height, width, dtype=like.dtype, device=like.device)
    frequency = 10000 ** (2 * (torch.arange(half, dtype=like.dtype, device=like.device) // 2) / half)
    sides = []
    for place, last in ((real.cumsum(0), height), (real.cumsum(1), width)):
        angle = (place / (last + 1e-6) * 2 * math.pi)[:, :, None] / frequency
        sides.append(torch.stack([angle[:, :, 0::2].sin(), angle[:, :, 1::2].cos()], dim=3).flatten(2))
    return torch.cat(sides, dim=2).flatten(0, 1)


class Recording(HungarianMatcher):
    """Keeps what it matched."""

    def __init__(self) -> None:
        super().__init__(class_cost=1, bbox_cost=5, giou_cost=2)
        self.found: list[list[tuple[Tensor, Tensor]]] = []

    def forward(self, outputs: Any, targets: Any) -> Any:
        self.found.append(super().forward(outputs, targets))
        return self.found[-1]


def set_losses(
    logits_LBQK: Tensor, boxes_LBQ4: Tensor, targets: list[dict[str, Tensor]], num_labels: int
) -> tuple[dict[str, Tensor], list[list[tuple[Tensor, Tensor]]]]:
    """transformers' losses of DETR, summed over layers, and its matchings, layer by layer and picture by picture."""
    matcher = Recording()
    criterion = ImageLoss(matcher, num_labels, 0.1, ["labels", "boxes"]).to(logits_LBQK)
    criterion.empty_weight[-1] = 0.1  # it was rounded to float32
    sums: dict[str, Tensor] = {}
    for logits, boxes in zip(logits_LBQK, boxes_LBQ4, strict=True):
        for name, value in criterion({"logits": logits, "pred_boxes": boxes}, targets).items():
            sums[name] = sums.get(name, logits.new_zeros(())) + value
    return sums, matcher.found
