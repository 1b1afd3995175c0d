"""The computation of ALBEF's public pretraining code, built out of transformers' ViT and BERT: plain, slow, obvious.

What the tests of parity compare with and albef_step.py times. Three fusion passes and one of all twelve layers for the
masked words, the head of masked words at every position, one draw of a negative after the other, the queue cloned and
joined to the batch, the average of weights tensor by tensor. Its negatives are drawn from given uniform numbers, so
that both sides take the same.

B rows, N image tokens, T text tokens, Q rows of the queue, D width of a projection, V vocabulary.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, ViTConfig, ViTModel
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer, BertOnlyMLMHead

from trivium.convert.albef import Layout, to_official
from trivium.convert.vit import to_hf
from trivium.methods.albef import FOLLOWED, AlbefMethod
from trivium.models.albef import Albef, AlbefConfig
from trivium.models.vit import ViT

PARTS = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")


class TextEncoder(nn.Module):
    """BertForMaskedLM of the public code: the first layers without cross-attention, the others with."""

    bert: Any
    cls: Any

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__()
        self.fusion_layer = config.text_layers
        common: dict[str, Any] = {
            "vocab_size": config.vocab_size, "hidden_size": config.width, "num_attention_heads": config.num_heads,
            "intermediate_size": config.mlp_width, "max_position_embeddings": config.max_length,
            "type_vocab_size": config.num_segments, "pad_token_id": config.pad_id, "layer_norm_eps": config.text_eps,
            "hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout,
            "attn_implementation": "eager",
        }  # fmt: skip
        plain = BertConfig(**common)
        fusing = BertConfig(**common, is_decoder=True, add_cross_attention=True)  # with a mask of ours: not causal
        self.bert = nn.Module()
        self.bert.embeddings = BertEmbeddings(plain)
        self.bert.encoder = nn.Module()
        self.bert.encoder.layer = nn.ModuleList(
            [BertLayer(plain) for _ in range(config.text_layers)]
            + [BertLayer(fusing) for _ in range(config.fusion_layers)]
        )
        self.cls = BertOnlyMLMHead(plain)
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight
        self.cls.predictions.decoder.bias = self.cls.predictions.bias

    def read(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """mode="text"."""
        states = self.bert.embeddings(input_ids=ids_BT)
        return self._layers(states, mask_BT, slice(0, self.fusion_layer), None)

    def fuse(self, text_BTD: Tensor, mask_BT: Tensor, image_BND: Tensor) -> Tensor:
        """mode="fusion"."""
        return self._layers(text_BTD, mask_BT, slice(self.fusion_layer, None), image_BND)

    def predict(self, ids_BT: Tensor, mask_BT: Tensor, image_BND: Tensor) -> Tensor:
        """mode="multi_modal", and the head at every position: logits [B, T, V]."""
        return self.cls(self.fuse(self.read(ids_BT, mask_BT), mask_BT, image_BND))

    def _layers(self, states: Tensor, mask_BT: Tensor, which: slice, image_BND: Tensor | None) -> Tensor:
        additive = (1.0 - mask_BT[:, None, None].to(states.dtype)) * -10000.0
        for layer in self.bert.encoder.layer[which]:
            states = layer(states, additive, encoder_hidden_states=image_BND)
        return states


@dataclass
class Inputs:
    """One batch as the public forward takes it, and the uniform numbers that its negatives are drawn from."""

    pixels_BCHW: Tensor  # normalised
    ids_BT: Tensor
    mask_BT: Tensor
    masked_ids_BT: Tensor
    labels_BT: Tensor  # -100 where nothing is asked
    image_draw_B: Tensor
    text_draw_B: Tensor
    idx_B: Tensor | None = None  # equal numbers are answers to each other, as in the published fine-tuning


class PublishedAlbef(nn.Module):
    """ALBEF of models/model_pretrain.py."""

    visual_encoder: Any
    visual_encoder_m: Any
    text_encoder: Any
    text_encoder_m: Any
    vision_proj: nn.Linear
    vision_proj_m: nn.Linear
    text_proj: nn.Linear
    text_proj_m: nn.Linear
    temp: nn.Parameter
    image_queue: Tensor
    text_queue: Tensor
    queue_ptr: Tensor
    idx_queue: Tensor

    def __init__(
        self,
        config: AlbefConfig,
        queue: int,
        momentum: float = 0.995,
        axis: int = -1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """axis: what soft labels of words are normalised over: -1 the vocabulary; 1 positions, as first published."""
        super().__init__()
        # transformers' plain attention of a ViT takes its softmax in float32, whatever the precision.
        attention: dict[str, Any] = {"attn_implementation": "sdpa" if dtype == torch.float64 else "eager"}
        self.momentum, self.axis = momentum, axis
        width, joint = config.width, config.projection_width
        for suffix in ("", "_m"):
            image = ViTConfig(
                hidden_size=width, num_attention_heads=config.num_heads, intermediate_size=config.mlp_width,
                num_hidden_layers=config.image_layers, image_size=config.image_size, patch_size=config.patch_size,
                layer_norm_eps=config.image_eps, **attention,
            )  # fmt: skip
            setattr(self, f"visual_encoder{suffix}", ViTModel(image, add_pooling_layer=False))
            setattr(self, f"text_encoder{suffix}", TextEncoder(config))
            setattr(self, f"vision_proj{suffix}", nn.Linear(width, joint))
            setattr(self, f"text_proj{suffix}", nn.Linear(width, joint))
        self.itm_head = nn.Linear(width, 2)
        self.temp = nn.Parameter(torch.tensor(config.start_temperature))
        self.register_buffer("image_queue", F.normalize(torch.randn(joint, queue), dim=0))
        self.register_buffer("text_queue", F.normalize(torch.randn(joint, queue), dim=0))
        self.register_buffer("idx_queue", torch.full((1, queue), -100))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.split(".")[0].removesuffix("_m") == name.split(".")[0])

    def image_states(self, pixels_BCHW: Tensor, suffix: str = "") -> Tensor:
        return getattr(self, f"visual_encoder{suffix}")(pixels_BCHW).last_hidden_state

    @torch.no_grad()
    def update_momentum(self) -> None:
        for part in PARTS:
            ours, theirs = getattr(self, part), getattr(self, f"{part}_m")
            for parameter, average in zip(ours.parameters(), theirs.parameters(), strict=True):
                average.data = average.data * self.momentum + parameter.data * (1.0 - self.momentum)

    def forward(self, inputs: Inputs, alpha: float, *, update: bool = True) -> dict[str, Tensor]:
        """Losses "itc", "itm" and "mlm"; the queue moves. update: so does the average, as at the head of a step."""
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        B = len(inputs.ids_BT)
        image_BND = self.image_states(inputs.pixels_BCHW)
        image_BD = F.normalize(self.vision_proj(image_BND[:, 0]), dim=-1)
        text_BTD = self.text_encoder.read(inputs.ids_BT, inputs.mask_BT)
        text_BD = F.normalize(self.text_proj(text_BTD[:, 0]), dim=-1)
        with torch.no_grad():
            if update:
                self.update_momentum()
            image_m = self.image_states(inputs.pixels_BCHW, "_m")
            image_m_BD = F.normalize(self.vision_proj_m(image_m[:, 0]), dim=-1)
            image_all = torch.cat([image_m_BD.t(), self.image_queue.clone().detach()], dim=1)
            text_m = self.text_encoder_m.read(inputs.ids_BT, inputs.mask_BT)
            text_m_BD = F.normalize(self.text_proj_m(text_m[:, 0]), dim=-1)
            text_all = torch.cat([text_m_BD.t(), self.text_queue.clone().detach()], dim=1)
            targets = torch.zeros(B, image_all.shape[1], dtype=image_all.dtype, device=image_all.device)
            if inputs.idx_B is None:
                targets.fill_diagonal_(1)
            else:
                everyone = torch.cat([inputs.idx_B[None], self.idx_queue.clone().detach()], dim=1)
                targets = (inputs.idx_B[:, None] == everyone).to(targets.dtype)
                targets = targets / targets.sum(1, keepdim=True)
            i2t_targets = alpha * F.softmax(image_m_BD @ text_all / self.temp, dim=1) + (1 - alpha) * targets
            t2i_targets = alpha * F.softmax(text_m_BD @ image_all / self.temp, dim=1) + (1 - alpha) * targets
        sim_i2t = image_BD @ text_all / self.temp
        sim_t2i = text_BD @ image_all / self.temp
        i2t = -torch.sum(F.log_softmax(sim_i2t, dim=1) * i2t_targets, dim=1).mean()
        t2i = -torch.sum(F.log_softmax(sim_t2i, dim=1) * t2i_targets, dim=1).mean()
        self._enqueue(image_m_BD, text_m_BD, inputs.idx_B)
        itm = self._matching(inputs, image_BND, text_BTD, sim_i2t, sim_t2i)
        with torch.no_grad():
            taught_BTV = self.text_encoder_m.predict(inputs.masked_ids_BT, inputs.mask_BT, image_m)
            soft_BTV = F.softmax(taught_BTV, dim=-1)
        logits_BTV = self.text_encoder.predict(inputs.masked_ids_BT, inputs.mask_BT, image_BND)
        hard = F.cross_entropy(logits_BTV.flatten(0, 1), inputs.labels_BT.flatten())
        soft = -torch.sum(F.log_softmax(logits_BTV, dim=self.axis) * soft_BTV, dim=-1)
        soft = soft[inputs.labels_BT != -100].mean()
        return {"itc": (i2t + t2i) / 2, "itm": itm, "mlm": (1 - alpha) * hard + alpha * soft}

    def _matching(
        self, inputs: Inputs, image_BND: Tensor, text_BTD: Tensor, sim_i2t: Tensor, sim_t2i: Tensor
    ) -> Tensor:
        B = len(text_BTD)
        positive_BTD = self.text_encoder.fuse(text_BTD, inputs.mask_BT, image_BND)
        with torch.no_grad():
            weights_i2t = F.softmax(sim_i2t[:, :B], dim=1)
            weights_t2i = F.softmax(sim_t2i[:, :B], dim=1)
            if inputs.idx_B is None:
                weights_i2t.fill_diagonal_(0)
                weights_t2i.fill_diagonal_(0)
            else:
                mask = inputs.idx_B[:, None] == inputs.idx_B
                weights_i2t.masked_fill_(mask, 0)
                weights_t2i.masked_fill_(mask, 0)
        images, texts, masks = [], [], []
        for b in range(B):
            drawn = self._draw(weights_t2i[b], inputs.image_draw_B[b])
            images.append(image_BND[drawn])
        for b in range(B):
            drawn = self._draw(weights_i2t[b], inputs.text_draw_B[b])
            texts.append(text_BTD[drawn])
            masks.append(inputs.mask_BT[drawn])
        text_all = torch.cat([text_BTD, torch.stack(texts)])
        mask_all = torch.cat([inputs.mask_BT, torch.stack(masks)])
        image_all = torch.cat([torch.stack(images), image_BND])
        negative_BTD = self.text_encoder.fuse(text_all, mask_all, image_all)
        logits = self.itm_head(torch.cat([positive_BTD[:, 0], negative_BTD[:, 0]]))
        labels = torch.cat([torch.ones(B, dtype=torch.long), torch.zeros(2 * B, dtype=torch.long)]).to(logits.device)
        return F.cross_entropy(logits, labels)

    @staticmethod
    def _draw(weights_B: Tensor, uniform: Tensor) -> int:
        """What torch.multinomial(weights, 1).item() does, from a given number."""
        reached = weights_B.double().cumsum(0)
        return int(torch.searchsorted(reached, uniform.double() * reached[-1], right=True).item())

    @torch.no_grad()
    def _enqueue(self, image_BD: Tensor, text_BD: Tensor, idx_B: Tensor | None) -> None:
        start, Q = int(self.queue_ptr), self.image_queue.shape[1]
        assert Q % len(image_BD) == 0
        self.image_queue[:, start : start + len(image_BD)] = image_BD.T
        self.text_queue[:, start : start + len(text_BD)] = text_BD.T
        if idx_B is not None:
            self.idx_queue[:, start : start + len(text_BD)] = idx_B
        self.queue_ptr[0] = (start + len(image_BD)) % Q


# ------------------------------------------------------------------------------------------- to and from our names


def official_layout(momentum: bool) -> Layout:
    names = [f"{part}{suffix}." for part in PARTS for suffix in ("", "_m") if momentum or not suffix]
    heads = [f"text_encoder{suffix}.cls." for suffix in ("", "_m") if momentum or not suffix]
    return Layout(frozenset([*names, *heads, "itm_head.", "temp"]), under_bert=True, two_pictures=False)


def their_names(
    state: dict[str, Tensor], config: AlbefConfig, peer: PublishedAlbef, momentum: bool
) -> dict[str, Tensor]:
    """Tensors of our student, of the teacher too ("teacher."), or their gradients, under their names."""
    found = {
        name: tensor
        for name, tensor in to_official(state, config, official_layout(momentum)).items()
        if not name.startswith(("visual_encoder.", "visual_encoder_m.")) and not name.endswith("position_ids")
    }
    for ours, theirs in (("image.", "visual_encoder."), ("teacher.image.", "visual_encoder_m.")):
        tower = {name.removeprefix(ours): tensor for name, tensor in state.items() if name.startswith(ours)}
        if tower:
            found |= {f"{theirs}{name}": t for name, t in _in_memory(tower, config, peer.visual_encoder).items()}
    return found


def _in_memory(tower: dict[str, Tensor], config: AlbefConfig, theirs: ViTModel) -> dict[str, Tensor]:
    """A ViT under the names that transformers' has in memory, which are not those of its files."""
    with torch.device("meta"):
        vit = ViT(config.image_tower)
    vit.load_state_dict(tower, assign=True)
    on_file = to_hf(vit)
    renamings = (
        ("layers.", "encoder.layer."), ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"), ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    )  # fmt: skip
    found = {}
    for name in theirs.state_dict():
        file_name = name
        for memory, file in renamings:
            file_name = file_name.replace(memory, file)
        found[name] = on_file[file_name].clone()
    return found


def published_from(method: AlbefMethod, axis: int = -1) -> PublishedAlbef:
    """The public computation with the weights, the teacher and the queues of ours, in its precision."""
    model: Albef = method.model
    dtype, momentum = model.temperature.dtype, method.distillation.momentum(method.num_steps)
    peer = PublishedAlbef(model.config, len(method.image_queue), momentum, axis, dtype).to(dtype)
    teacher = {f"teacher.{name}": tensor for name, tensor in method.teacher.state_dict().items()}
    assert {name.split(".")[1] for name in teacher} == set(FOLLOWED)
    state = their_names({**model.state_dict(), **teacher}, model.config, peer, momentum=True)
    state |= {
        "image_queue": method.image_queue.T.clone(), "text_queue": method.text_queue.T.clone(),
        "idx_queue": method.queue_same[:, 0][None].clone(), "queue_ptr": method.queue_pointer.clone(),
    }  # fmt: skip
    peer.load_state_dict(state)
    for part, suffix in itertools.product(("text_encoder",), ("", "_m")):  # loading keeps what is tied
        encoder = getattr(peer, f"{part}{suffix}")
        assert encoder.cls.predictions.decoder.weight is encoder.bert.embeddings.word_embeddings.weight
    return peer.train()
