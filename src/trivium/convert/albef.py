"""ALBEF's official files in and out: pretrained (ALBEF.pth, ALBEF_4M.pth) and fine-tuned (mscoco, flickr30k, refcoco,
ve, vqa, nlvr), each with the parts that it happens to have.

    visual_encoder.    a ViT in timm's layout                          image.
    text_encoder.      a BERT of 12 layers, the last six with          text.  fusion.  mlm_head.
                       cross-attention; under bert. where it has a
                       head of masked words
    text_decoder.      the BERT that writes answers (vqa)              head.
    cls_head.          the classifier of ve and nlvr                   head.
    ta_head.           that of text assignment, before nlvr            head.
    temp               a number without a dimension                    temperature, [1]
    image_queue        [D, Q]                                          image_queue, [Q, D]
    ..._m.             the momentum copy of a part                     teacher.

What differs beside names: queries, keys and values stand apart there; the last matrix of a head of masked words is the
word embeddings under another name, and its bias stands there twice; with two pictures (nlvr) the layers of fusion stand
in pairs, whose keys and values of cross-attention are one tensor under two names; here the first of each pair is the
fusion's and the second the head's.

A layout is told by the names of its tensors, the sizes by their shapes; the number of heads, which no shape shows, is
width / 64, as in every released file, unless a config.json beside says it.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trivium.convert import bert
from trivium.convert.places import Place, give, pair, take
from trivium.convert.vit import HEAD_WIDTH, timm_places
from trivium.convert.weights import State, listed
from trivium.errors import TriviumError
from trivium.models.albef import Albef, AlbefConfig
from trivium.models.albef_heads import AnswerDecoder, TwoPictures, decoder_config
from trivium.models.bert import BertConfig
from trivium.models.finetuned import HeadConfig

UNSEEN_OF_WRITER = ("task", "ranked", "first_word_twice")  # of a head that writes answers
CAPTION_TOKENS = 30  # that are read of a caption where the public code measures retrieval
_IGNORED = re.compile(r"(^|\.)position_ids$")
_LAYER = re.compile(r"text_encoder\.(?:bert\.)?encoder\.layer\.(\d+)\.")
_BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.(.*)")
# Parts that not every file has: how the names of their tensors begin, theirs and ours.
_PARTS = {
    "vision_proj.": "image_projection.", "text_proj.": "text_projection.", "itm_head.": "itm_head.",
    "text_encoder.cls.": "mlm_head.", "text_decoder.": "head.", "cls_head.": "head.", "ta_head.": "head.decoder.",
}  # fmt: skip
_SINGLES = {
    "temp": Place("temperature", ("temp",), shape=()),
    "image_queue": Place("image_queue", ("image_queue",), "transposed"),
    "text_queue": Place("text_queue", ("text_queue",), "transposed"),
    "queue_ptr": Place("queue_pointer", ("queue_ptr",)),
    "idx_queue": Place("queue_pictures", ("idx_queue",)),
}
_QUEUES = _SINGLES.keys() - {"temp"}
LEARNED_LATER = ("image_projection.", "text_projection.", "itm_head.", "mlm_head.", "temperature")


@dataclass(frozen=True)
class Layout:
    """Which parts a file has."""

    parts: frozenset[str]  # beginnings of their names, and whole names of tensors that stand alone
    under_bert: bool  # text_encoder.bert.encoder... instead of text_encoder.encoder...
    two_pictures: bool  # layers of fusion in pairs, of which the second has no keys and values of its own

    @property
    def head(self) -> str:
        """How the names of its head begin, "" without one; of two pictures, marked."""
        found = next((part for part in ("text_decoder.", "ta_head.", "cls_head.") if part in self.parts), "")
        return f"pairs {found}" if self.two_pictures and found == "cls_head." else found


_COPIED = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")  # what has a momentum copy in pretraining
PRETRAINED = Layout(  # but for the queues
    frozenset({f"{part}{momentum}." for part in _COPIED for momentum in ("", "_m")})
    | {"text_encoder.cls.", "text_encoder_m.cls.", "itm_head.", "temp"},
    under_bert=True,
    two_pictures=False,
)
RETRIEVAL = Layout(  # mscoco, flickr30k: without the head of masked words, and without the queues
    frozenset({f"{part}{momentum}." for part in _COPIED for momentum in ("", "_m")} | {"itm_head.", "temp"}),
    under_bert=False,
    two_pictures=False,
)
GROUNDING = Layout(  # refcoco: without momentum copy too, and without the wrapper that the others have
    frozenset({f"{part}." for part in _COPIED} | {"itm_head.", "temp"}), under_bert=False, two_pictures=False
)
_TUNED = frozenset({"visual_encoder.", "visual_encoder_m.", "text_encoder.", "text_encoder_m."})
ENTAILMENT = Layout(_TUNED | {"cls_head.", "cls_head_m."}, under_bert=False, two_pictures=False)  # ve
ANSWERS = Layout(_TUNED | {"text_decoder.", "text_decoder_m."}, under_bert=False, two_pictures=False)  # vqa
TWO_PICTURES = replace(ENTAILMENT, two_pictures=True)  # nlvr
ASSIGNMENT = Layout(  # pretrain_model_nlvr
    frozenset({"visual_encoder.", "text_encoder.", "vision_proj.", "text_proj.", "temp", "ta_head."}),
    under_bert=False,
    two_pictures=True,
)
LABELS = {  # of a head (see Layout), as its outputs are numbered
    "cls_head.": ("contradiction", "neutral", "entailment"),
    "pairs cls_head.": ("False", "True"),
    "ta_head.": ("first", "second", "neither"),
}


def from_official(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[AlbefConfig, State, Layout]:
    """An official file -> ours: names of an Albef; beside them "teacher.", "head." and the queues, where the file has
    them.

    Args:
        config: the config.json beside it; {} without.

    Raises:
        TriviumError: missing, unexpected or wrongly shaped tensors; a file of LAVIS, whose texts were read differently.
    """
    theirs = {name: tensor for name, tensor in state.items() if not _IGNORED.search(name)}
    layout = _layout(theirs)
    if not any(name.endswith("embeddings.token_type_embeddings.weight") for name in theirs):
        raise TriviumError(
            "this ALBEF has no token_type_embeddings: it was trained in LAVIS, where texts end with [SEP], and would"
            " give other features here; take an official file, such as ALBEF.pth"
        )
    ours = config_of(theirs, layout, config)
    if layout.two_pictures:
        theirs = _without_twins(theirs, ours)
    return ours, take(theirs, places(ours, layout), _shapes(ours, layout, theirs), "ALBEF"), layout


def to_official(state: Mapping[str, Tensor], config: AlbefConfig, layout: Layout) -> State:
    """What `from_official` gave, back. Tensors may be views."""
    found = give(state, places(config, layout))
    if layout.two_pictures:
        found |= _twins(found, config)
    for name in list(found):
        if name.endswith("embeddings.position_embeddings.weight"):
            positions = name.replace("position_embeddings.weight", "position_ids")
            found[positions] = torch.arange(len(found[name]))[None]
    return found


def build(config: AlbefConfig, state: Mapping[str, Tensor]) -> tuple[Albef, list[str]]:
    """A model with these weights in float32; heads that they lack are drawn from N(0, 0.02), seed 0.

    Returns:
        the model, and the names of the parts that were drawn.
    """
    with torch.device("meta"):
        model = Albef(config)
    whole = {name: state[name].float() if name in state else _drawn(name, tensor.shape, config)
             for name, tensor in model.state_dict().items()}  # fmt: skip
    model.load_state_dict(whole, assign=True)
    return model, sorted({name.partition(".")[0] for name in whole if name not in state})


def state_as(layout: Layout, model: Albef, head: Mapping[str, Tensor] | None = None) -> State:
    """A model, and the head of its task, as a file of a layout has them, momentum copy and all, which the public code
    asks for; no queues. What the layout has no place for is left out."""
    own = dict(model.state_dict()) | {f"head.{name}": tensor for name, tensor in (head or {}).items()}
    state = own | {f"teacher.{name}": tensor for name, tensor in own.items()}
    named = {place.ours for place in places(model.config, layout)}
    return to_official({n: t for n, t in state.items() if n in named}, model.config, layout)


def without_place(layout: Layout, model: Albef) -> list[str]:
    """Parts of a model that `state_as` leaves out."""
    named = {place.ours for place in places(model.config, layout)}
    return sorted({name.partition(".")[0] for name in model.state_dict() if name not in named})


def head_config(
    config: AlbefConfig, layout: Layout, state: Mapping[str, Tensor], beside: Mapping[str, Any]
) -> HeadConfig | None:
    """Of the head of a fine-tuned file, as its own task has it (recipes/tasks.py); of a writer the list of its answers
    lies elsewhere, and a config.json beside may say under "head" what no tensor shows. None of a file without one.
    Raises TriviumError for labels whose names nobody knows."""
    if not layout.head:
        return None
    width, blocks = config.width, decoder_config(config)
    if layout.head == "text_decoder.":
        said = {name: beside["head"][name] for name in UNSEEN_OF_WRITER if name in beside.get("head", {})}
        return replace(HeadConfig("vqa", "states", "text", width, 0, blocks=blocks), **said)
    num_labels, labels = len(state["head.decoder.weight"]), LABELS[layout.head]
    if num_labels != len(labels):
        raise TriviumError(
            f"this ALBEF was fine-tuned for {num_labels} labels, whose names its file does not hold:"
            f" {', '.join(labels)} are known"
        )
    if layout.head == "cls_head.":
        return HeadConfig("visual_entailment", "fused", "class", width, num_labels, width, "relu", dropout=0.0)
    task, hidden = ("nlvr2", width) if layout.head == "pairs cls_head." else ("text_assignment", None)
    return HeadConfig(
        task, "two_pictures", "class", width, num_labels, hidden, "relu", 0.0, blocks=blocks, num_pictures=2
    )


def tuned_for(layout: Layout) -> tuple[str, ...]:
    """The tasks for one of which a file without a head was fine-tuned: it does not say which. () of any other."""
    plain = replace(layout, parts=layout.parts - _QUEUES)
    return ("Flickr30K retrieval", "COCO retrieval") if plain == RETRIEVAL else ()


def layout_for(head: HeadConfig) -> Layout | None:
    """That of the files which hold such a head; None where there are none."""
    if head.gives == "text":
        return ANSWERS
    if (head.gives, head.activation) != ("class", "relu"):
        return None
    if head.reads == "two_pictures":
        return ASSIGNMENT if head.hidden is None else TWO_PICTURES if head.hidden == head.width else None
    return ENTAILMENT if (head.reads, head.hidden) == ("fused", head.width) else None


def in_official_order(head: Mapping[str, Tensor], labels: Sequence[str], layout: Layout) -> dict[str, Tensor]:
    """A head whose outputs are numbered as in the file of a layout. Raises TriviumError for other labels."""
    official = LABELS.get(layout.head)
    if official is None:
        return dict(head)
    if sorted(labels) != sorted(official):
        raise TriviumError(
            f"ALBEF's files of this kind hold {', '.join(official)}, and this head {', '.join(labels)}: write it as"
            " trivium"
        )
    order = torch.tensor([list(labels).index(label) for label in official])
    return {name: t[order] if name.startswith("decoder.") else t for name, t in head.items()}


def config_of(state: Mapping[str, Tensor], layout: Layout, config: Mapping[str, Any]) -> AlbefConfig:
    """Sizes as shapes tell them. Raises TriviumError where one does not."""
    text = f"text_encoder.{'bert.' if layout.under_bert else ''}"
    needed = {
        "visual_encoder.patch_embed.proj.weight": 4, "visual_encoder.pos_embed": 3,
        f"{text}embeddings.word_embeddings.weight": 2, f"{text}embeddings.position_embeddings.weight": 2,
        f"{text}encoder.layer.0.intermediate.dense.weight": 2,
    }  # fmt: skip
    wrong = [name for name, ndim in needed.items() if name not in state or state[name].ndim != ndim]
    if wrong:
        raise TriviumError(f"this ALBEF checkpoint {listed('misses', wrong)}")
    patches, positions, words, places_, inner = (state[name] for name in needed)
    width, _, patch_size, _ = patches.shape
    heads = config.get("num_attention_heads")
    if heads is None:
        if width % HEAD_WIDTH:
            raise TriviumError(
                f"width {width} is no multiple of {HEAD_WIDTH}, so the number of attention heads is not known: put a"
                ' config.json with {"num_attention_heads": ...} beside the weights'
            )
        heads = width // HEAD_WIDTH
    layers = {int(match[1]) for match in map(_LAYER.match, state) if match}
    fusing = {n for n in layers if f"{text}encoder.layer.{n}.crossattention.self.query.weight" in state}
    images = [int(match[1]) for match in map(re.compile(r"visual_encoder\.blocks\.(\d+)\.").match, state) if match]
    segments = state[f"{text}embeddings.token_type_embeddings.weight"]
    projection = state.get("vision_proj.weight")
    return AlbefConfig(
        width=width,
        num_heads=heads,
        mlp_width=inner.shape[0],
        image_layers=1 + max(images),
        text_layers=len(layers) - len(fusing),
        fusion_layers=len(fusing) // (2 if layout.two_pictures else 1),
        image_size=math.isqrt(positions.shape[1] - 1) * patch_size,
        patch_size=patch_size,
        vocab_size=words.shape[0],
        max_length=places_.shape[0],
        num_segments=segments.shape[0],
        projection_width=AlbefConfig.projection_width if projection is None else projection.shape[0],
    )


# -------------------------------------------------------------------------------------------------- the table


def places(config: AlbefConfig, layout: Layout) -> Iterator[Place]:
    """Where every tensor of a file stands here."""
    for momentum, ours in (("", ""), ("_m", "teacher.")):
        if f"visual_encoder{momentum}." in layout.parts:
            yield from timm_places(config.image_tower, f"{ours}image.", f"visual_encoder{momentum}.")
        if f"text_encoder{momentum}." in layout.parts:
            has_head = f"text_encoder{momentum}.cls." in layout.parts
            yield from _text_places(config, layout, ours, f"text_encoder{momentum}.", has_head)
        if f"text_decoder{momentum}." in layout.parts:
            for place in _bert_places(decoder_config(config), f"text_decoder{momentum}."):
                yield replace(place, ours=f"{ours}head.{place.ours}")
        if f"cls_head{momentum}." in layout.parts:
            yield from pair(f"{ours}head.inner", f"cls_head{momentum}.0")
            yield from pair(f"{ours}head.decoder", f"cls_head{momentum}.2")
        for theirs in ("vision_proj", "text_proj", "itm_head", "ta_head"):
            if f"{theirs}{momentum}." in layout.parts:
                yield from pair(f"{ours}{_PARTS[f'{theirs}.'].rstrip('.')}", f"{theirs}{momentum}")
    yield from (place for name, place in _SINGLES.items() if name in layout.parts)


def _text_places(config: AlbefConfig, layout: Layout, ours: str, theirs: str, has_head: bool) -> Iterator[Place]:
    fused_layers = config.fusion_layers * (2 if layout.two_pictures else 1)
    whole = replace(
        config.text_tower,
        num_layers=config.text_layers + fused_layers,
        memory_width=config.width,
        mlm_head=has_head,
    )
    for place in _bert_places(whole, theirs):
        name = place.ours
        if match := _BLOCK.fullmatch(name):
            number, rest = int(match[1]), match[2]
            fused = number - config.text_layers
            if fused < 0 and rest.startswith("cross_attention"):
                continue
            is_second = layout.two_pictures and fused >= 0 and fused % 2 == 1
            if is_second and rest.startswith("cross_attention.key_value"):
                continue  # its twin's
            pair_or_layer = fused // 2 if layout.two_pictures else fused
            blocks = "text.encoder.blocks" if fused < 0 else "head.seconds" if is_second else "fusion.blocks"
            name = f"{blocks}.{number if fused < 0 else pair_or_layer}.{rest}"
        elif not name.startswith("mlm_head."):
            name = f"text.{name}"
        there = place.theirs if layout.under_bert else tuple(t.replace(".bert.", ".") for t in place.theirs)
        yield replace(place, ours=f"{ours}{name}", theirs=there)


def _bert_places(config: BertConfig, theirs: str) -> Iterator[Place]:
    """A BERT in Hugging Face's layout under a prefix; the names that are tied to others beside them."""
    head = f"{theirs}cls.predictions.decoder"
    for name, sources in bert.places(config):
        there = tuple(f"{theirs}{source}" for source in sources)
        if config.mlm_head and name == "embeddings.word.weight":
            yield Place(name, (*there, f"{head}.weight"), "tied")
        elif name == "mlm_head.bias":
            yield Place(name, (*there, f"{head}.bias"), "tied")
        else:
            yield Place(name, there, "stacked" if len(there) > 1 else "plain")


def _layout(state: Mapping[str, Tensor]) -> Layout:
    names = ["visual_encoder.", "text_encoder.", *_PARTS]
    names += [re.sub(r"^(\w+)\.", r"\1_m.", name) for name in names]
    parts = {part for part in names if any(name.startswith(part) for name in state)}
    layers = sorted({int(match[1]) for match in map(_LAYER.match, state) if match})
    under_bert = any(name.startswith("text_encoder.bert.") for name in state)
    keys = [
        state[name]
        for n in layers
        if (name := f"text_encoder.{'bert.' if under_bert else ''}encoder.layer.{n}.crossattention.self.key.weight")
        in state
    ]
    in_pairs = bool(keys) and len(keys) % 2 == 0
    two_pictures = in_pairs and all(torch.equal(a, b) for a, b in zip(keys[::2], keys[1::2], strict=True))
    return Layout(frozenset(parts | (_SINGLES.keys() & state.keys())), under_bert, two_pictures)


def _twin_names(state: Mapping[str, Tensor], config: AlbefConfig) -> Iterator[tuple[str, str]]:
    """(name in the first layer of a pair, its name in the second), of tensors that both layers share."""
    pattern = re.compile(r"(.*\.layer\.)(\d+)(\.crossattention\.self\.(?:key|value)\..*)")
    for match in filter(None, map(pattern.fullmatch, state)):
        number = int(match[2])
        if (number - config.text_layers) % 2 == 0:
            yield match[0], f"{match[1]}{number + 1}{match[3]}"


def _without_twins(state: State, config: AlbefConfig) -> State:
    twins = dict(_twin_names(state, config))
    for name, twin in twins.items():
        if twin in state and not torch.equal(state[name], state[twin]):
            raise TriviumError(f"{name} and {twin} are one tensor in ALBEF, but differ here: the file is damaged")
    return {name: tensor for name, tensor in state.items() if name not in set(twins.values())}


def _twins(state: State, config: AlbefConfig) -> State:
    return {twin: state[name] for name, twin in _twin_names(state, config)}


def _shapes(config: AlbefConfig, layout: Layout, state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Of everything in ours that a file may hold; of heads and queues, whose sizes are free, as the file has them."""
    with torch.device("meta"):
        model, writer = Albef(config).state_dict(), AnswerDecoder(decoder_config(config)).state_dict()
        judge = TwoPictures(decoder_config(config), None, 1)
    found = {name: tuple(tensor.shape) for name, tensor in model.items()}
    found |= {f"head.{name}": tuple(tensor.shape) for name, tensor in writer.items()}
    found |= {f"head.seconds.{name}": tuple(tensor.shape) for name, tensor in judge.seconds.state_dict().items()}
    found |= {f"teacher.{name}": shape for name, shape in list(found.items())}
    for place in places(config, layout):
        if place.ours not in found:
            shape = tuple(state[place.theirs[0]].shape) if place.theirs[0] in state else ()
            found[place.ours] = shape[::-1] if place.kind == "transposed" else shape
    return found


def _drawn(name: str, shape: torch.Size, config: AlbefConfig) -> Tensor:
    assert name.startswith(LEARNED_LATER), f"{name} is no head"
    if name == "temperature":
        return torch.full(shape, config.start_temperature)
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("norm.weight") else torch.zeros(shape)
    return torch.empty(shape).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
