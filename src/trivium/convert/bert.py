"""BERT's weights in the layout of Hugging Face transformers, in and out.

One table, made from the config, says where every tensor of ours stands there. What differs beside names:

* they keep queries, keys and values apart, we keep one matrix with the rows of q, k, v in that order (cross-attention:
  the query alone, then one matrix with the rows of k, v);
* the last matrix of the head of masked words is the word embeddings under another name, and its bias stands there
  twice: here each is one tensor;
* old files call the weight and bias of a norm gamma and beta;
* a bare model has no leading ``bert.``; a model saved from within sentence-transformers has ``0.auto_model.`` there.

What a file holds beyond the model (the head of next-sentence prediction, a classifier) is left out, and said.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trivium.convert.weights import State, listed
from trivium.errors import TriviumError
from trivium.models.bert import Bert, BertConfig

_PREFIXES = ("0.auto_model.", "bert.", "")
_IGNORED = re.compile(r"(^|\.)(position_ids|token_type_ids)$")
_BEYOND = re.compile(r"cls\.seq_relationship\..*|classifier\..*|qa_outputs\..*|dropout\..*|\d+\.linear\..*")
_HEAD = "cls.predictions"
_DECODER = f"{_HEAD}.decoder.weight"


def places(config: BertConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(our tensor, theirs): several of theirs are stacked to one of ours. Under the names of BertForMaskedLM."""
    embeddings = "bert.embeddings"
    for ours, theirs in (("word", "word"), ("position", "position"), ("segment", "token_type")):
        yield f"embeddings.{ours}.weight", (f"{embeddings}.{theirs}_embeddings.weight",)
    yield from _pair("embeddings.norm", f"{embeddings}.LayerNorm")
    for n in range(config.num_layers):
        ours, theirs = f"encoder.blocks.{n}", f"bert.encoder.layer.{n}"
        yield from _stacked(f"{ours}.attention.qkv", f"{theirs}.attention.self", ("query", "key", "value"))
        yield from _pair(f"{ours}.attention.out", f"{theirs}.attention.output.dense")
        yield from _pair(f"{ours}.attention_norm", f"{theirs}.attention.output.LayerNorm")
        if config.memory_width is not None:
            yield from _pair(f"{ours}.cross_attention.query", f"{theirs}.crossattention.self.query")
            yield from _stacked(f"{ours}.cross_attention.key_value", f"{theirs}.crossattention.self", ("key", "value"))
            yield from _pair(f"{ours}.cross_attention.out", f"{theirs}.crossattention.output.dense")
            yield from _pair(f"{ours}.cross_attention_norm", f"{theirs}.crossattention.output.LayerNorm")
        yield from _pair(f"{ours}.mlp_in", f"{theirs}.intermediate.dense")
        yield from _pair(f"{ours}.mlp_out", f"{theirs}.output.dense")
        yield from _pair(f"{ours}.mlp_norm", f"{theirs}.output.LayerNorm")
    if config.pooler:
        yield from _pair("pooler", "bert.pooler.dense")
    if config.mlm_head:
        yield from _pair("mlm_head.transform", f"{_HEAD}.transform.dense")
        yield from _pair("mlm_head.norm", f"{_HEAD}.transform.LayerNorm")
        yield "mlm_head.bias", (f"{_HEAD}.bias",)


def _pair(ours: str, theirs: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for part in ("weight", "bias"):
        yield f"{ours}.{part}", (f"{theirs}.{part}",)


def _stacked(ours: str, theirs: str, pieces: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for part in ("weight", "bias"):
        yield f"{ours}.{part}", tuple(f"{theirs}.{piece}.{part}" for piece in pieces)


def from_hf(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[BertConfig, State, list[str]]:
    """Weights of a BertModel, BertForMaskedLM, BertForPreTraining or BertLMHeadModel, and the config.json -> ours.

    Returns:
        our config and tensors, and a sentence for what was left out.

    Raises:
        TriviumError: another family or an unsupported variant (names what differs); missing, unexpected or wrongly
            shaped tensors (the first five and how many).
    """
    theirs = _plain_names(state)
    if f"{_HEAD}.decoder.bias" in theirs:  # some files hold the one name, some the other
        theirs.setdefault(f"{_HEAD}.bias", theirs[f"{_HEAD}.decoder.bias"])
    ours = config_from_hf(config, theirs)
    _refuse_untied(theirs)
    beyond = sorted(name for name in theirs if _BEYOND.fullmatch(name))
    left = {name for name in theirs if not _IGNORED.search(name)} - {*beyond, _DECODER, f"{_HEAD}.decoder.bias"}
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Bert(ours).state_dict().items()}
    taken: State = {}
    missing: list[str] = []
    for name, sources in places(ours):
        absent = [source for source in sources if source not in theirs]
        missing += absent
        if absent:
            continue
        left -= set(sources)
        tensor = torch.cat([theirs[source] for source in sources]) if len(sources) > 1 else theirs[sources[0]]
        if tuple(tensor.shape) != shapes[name]:
            raise TriviumError(
                f"{sources[0]} makes a tensor of shape {list(tensor.shape)} where its config makes"
                f" {list(shapes[name])}: weights and config belong to different models"
            )
        taken[name] = tensor
    if missing or left:
        found = [listed("misses", missing), listed("has unexpected", sorted(left))]
        raise TriviumError(f"this BERT checkpoint {' and '.join(part for part in found if part)}")
    said = [f"left out, since the model has no place for it: {', '.join(beyond)}"] if beyond else []
    return ours, taken, said


def build(config: BertConfig, state: Mapping[str, Tensor], said: list[str]) -> tuple[Bert, list[str]]:
    """A model with these weights in float32, and what `from_hf` said."""
    with torch.device("meta"):
        model = Bert(config)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return model, said


def to_hf(state: Mapping[str, Tensor], config: BertConfig) -> State:
    """Our weights under their names: those of a BertModel, or with a head of masked words of a BertForMaskedLM (with
    a pooler beside it, of a BertForPreTraining without next-sentence head). Tensors may be views."""
    found: State = {}
    for name, sources in places(config):
        found |= zip(sources, state[name].chunk(len(sources)), strict=True)
    if not config.mlm_head:
        return {name.removeprefix("bert."): tensor for name, tensor in found.items()}
    found[_DECODER] = found["bert.embeddings.word_embeddings.weight"]
    found[f"{_HEAD}.decoder.bias"] = found[f"{_HEAD}.bias"]
    return found


def config_from_hf(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> BertConfig:
    """config.json of a BERT -> ours; which of pooler and head there is, the tensors say (names as `to_hf` writes them).

    Raises:
        TriviumError: another family, or a variant that this model does not have; the sentence names the field.
    """
    family = config.get("model_type", "bert")
    if family != "bert":
        raise TriviumError(f'config.json says model_type "{family}" where "bert" is needed: give a BERT checkpoint')
    for field, value in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if config.get(field, value) != value:
            raise TriviumError(f"config.json: {field} is {config[field]!r}, only {value!r} is supported")
    width = config.get("hidden_size", 768)
    key = state.get("bert.encoder.layer.0.crossattention.self.key.weight")
    return BertConfig(
        width=width,
        num_heads=config.get("num_attention_heads", 12),
        mlp_width=config.get("intermediate_size", 3072),
        num_layers=config.get("num_hidden_layers", 12),
        vocab_size=config.get("vocab_size", 30522),
        max_length=config.get("max_position_embeddings", 512),
        num_segments=config.get("type_vocab_size", 2),
        pad_id=config.get("pad_token_id", 0) or 0,
        eps=config.get("layer_norm_eps", 1e-12),
        dropout=max(float(config.get(f"{kind}_dropout_prob", 0.1)) for kind in ("hidden", "attention_probs")),
        pooler="bert.pooler.dense.weight" in state,
        mlm_head=f"{_HEAD}.transform.dense.weight" in state,
        memory_width=None if key is None else key.shape[1],
    )


def config_to_hf(config: BertConfig) -> dict[str, Any]:
    """Our config as the config.json of the class that `to_hf` gives the weights of."""
    decodes = config.memory_width is not None
    kind = "BertLMHeadModel" if decodes else "BertForMaskedLM"
    if config.pooler and config.mlm_head:
        kind = "BertForPreTraining"
    return {
        "architectures": [kind if config.mlm_head else "BertModel"],
        "model_type": "bert",
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "type_vocab_size": config.num_segments,
        "pad_token_id": config.pad_id,
        "layer_norm_eps": config.eps,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "is_decoder": decodes,
        "add_cross_attention": decodes,
    }


def _plain_names(state: Mapping[str, Tensor]) -> State:
    """Every tensor under the name that BertForMaskedLM gives it today."""
    prefix = next(p for p in _PREFIXES if p == "" or any(name.startswith(p) for name in state))
    found: State = {}
    for name, tensor in state.items():
        inside = name.removeprefix(prefix)
        if (prefix and name.startswith(prefix)) or (
            not prefix and name.startswith(("embeddings.", "encoder.", "pooler."))
        ):
            name = f"bert.{inside}"
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
        found[name] = tensor
    return found


def _refuse_untied(state: State) -> None:
    """Raises TriviumError where the head of masked words has a last matrix or a bias of its own."""
    for one, other in (
        (_DECODER, "bert.embeddings.word_embeddings.weight"),
        (f"{_HEAD}.decoder.bias", f"{_HEAD}.bias"),
    ):
        if one in state and other in state and not torch.equal(state[one], state[other]):
            raise TriviumError(
                f"{one} and {other} are one tensor in BERT, but differ here: such a head is not supported"
            )
