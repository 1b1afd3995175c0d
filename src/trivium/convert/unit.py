"""UniT's released checkpoints of MMF, in and out, and DETR's as the UniT of one task that it is.

    unit_base_model.backbone.0.body.      torchvision's ResNet, its norms frozen      image.backbone.
    unit_base_model.transformer.encoder.                                             image.blocks.
    unit_base_model.transformer.decoder.  where it is shared; each tensor once more  decoders.shared.
                                          under decoders.TYPE.DATASET. for each task
    ....transformer.decoders.TYPE.DATASET.  where they are separate                  decoders.TASK.
    bert_model.module.                    a BERT; its embeddings once more under     text.
                                          bert_model.embeddings.
    ....task_embeddings_enc, task_embeddings_lang   tables, a row for each task    image.task_tokens. text_task_tokens.
    class_embeds. bbox_embeds. classifiers. det_losses.DATASET.attribute_head.       heads.

What is left out on the way in: BERT's pooler, which nothing reads. The oldest file calls the base detr_model. Tasks
are told by the names of the data sets, which are MMF's; the sizes by shapes. What no shape shows is as in all released
files, unless a config.json beside the weights says it, as `config_beside` writes it: all of it or any part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from trivium.convert import bert
from trivium.convert.places import Place, give, pair, take
from trivium.convert.vit import HEAD_WIDTH
from trivium.convert.weights import State, listed
from trivium.errors import TriviumError
from trivium.models.unit import PUBLISHED_TASKS, Unit, UnitConfig, UnitTask

MMF_NAMES = {  # of our tasks: the type and the data set that they are filed under
    "coco": ("detection", "detection_coco"),
    "vg": ("detection", "detection_visual_genome"),
    "vqav2": ("vl", "vqa2"),
    "snli_ve": ("vl", "visual_entailment"),
    "qnli": ("glue", "glue_qnli"),
    "mnli": ("glue", "glue_mnli_mismatched"),
    "sst2": ("glue", "glue_sst2"),
    "qqp": ("glue", "glue_qqp"),
}
TRANSFORM: dict[str, Any] = {  # of pictures at evaluation: the shorter side 800 pixels, the longer one at most 1333
    "size": 800, "crop": "shortest", "longest": 1333, "filter": "bilinear",
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
}  # fmt: skip
_IGNORED = re.compile(
    r"(^|\.)(position_ids|num_batches_tracked|empty_weight)$|^bert_model\.(module\.)?pooler\.|^classifiers\.\w+$"
)
_QUERIES = re.compile(r"unit_base_model\.query_embeds\.(\w+)\.(\w+)\.weight")
_BASE = "unit_base_model."
Side = Literal["image", "text"]
_TOKENS: dict[Side, str] = {"image": "image.task_tokens", "text": "text_task_tokens"}
_TABLES: dict[Side, str] = {  # of task tokens
    "image": f"{_BASE}transformer.task_embeddings_enc.weight", "text": "task_embeddings_lang.weight",
}  # fmt: skip
NO_OBJECT = 0.1  # the last number of the weights of classes that those files carry
# What no shape shows: of a model, and of each of its tasks.
UNSEEN = ("num_heads", "text_heads", "dilated", "backbone_eps", "residual", "eps", "text_eps", "pad_id", "dropout")
UNSEEN_OF_TASK = ("number", "reads", "text", "gives", "max_length")
_WORDS = {"reads": ("image", "text", "both"), "text": ("class", "all"), "gives": ("class", "answers")}


# ------------------------------------------------------------------------------------------------ in and out


def from_mmf(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[UnitConfig, State]:
    """A released checkpoint, single-task or multitask, with separate decoders or a shared one -> ours.

    Raises:
        TriviumError: a data set that is none of UniT's eight, copies of one tensor that differ; missing, unexpected or
            wrongly shaped tensors (the first five and how many).
    """
    state = {name.replace("detr_model.", _BASE): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if not _IGNORED.search(name)}
    ours = config_of_mmf(state, config)
    tokens: State = {}
    for side, table in _TABLES.items() if ours.num_task_tokens else ():
        _shape(state, table, "UniT")
        width = ours.image_width if side == "image" else ours.text_width
        if tuple(state[table].shape) != (ours.num_task_tokens, width):
            raise TriviumError(
                f"{table} has shape {list(state[table].shape)} where its config makes {[ours.num_task_tokens, width]}:"
                " weights and config belong to different models"
            )
        tokens |= tokens_of(state.pop(table), ours, side)
    return ours, take(state, mmf_places(ours), _shapes(ours), "UniT") | tokens


def to_mmf(state: Mapping[str, Tensor], config: UnitConfig) -> State:
    """What `from_mmf` gave, back, but for BERT's pooler. Tensors may be views.

    Raises:
        TriviumError: a model that MMF has no place for.
    """
    filed = {name: "detection" if kind == "detection" else "labels" for name, (kind, _) in MMF_NAMES.items()}
    unknown = [f"{task.name} of {task.kind}" for task in config.tasks if filed.get(task.name) != task.kind]
    has_shape = config.backbone_norm == "frozen" and config.bottleneck and config.text_layers
    if unknown or not has_shape or not config.has_published_places:
        what = "such a backbone or text encoder" if not has_shape else "anchors or such positions"
        why = f"no data set for the task {unknown[0]}" if unknown else f"no place for {what}"
        raise TriviumError(f"MMF's UniT has {why}: only models of the released shape can be written in its layout")
    found = give(state, mmf_places(config))
    for side, table in _TABLES.items() if config.num_task_tokens else ():
        found[table] = _table(state, config, side)
    found["bert_model.module.embeddings.position_ids"] = torch.arange(config.max_length)[None]
    found["bert_model.embeddings.position_ids"] = torch.arange(config.max_length)[None]
    for task in config.tasks:
        if task.kind == "detection":
            weights = torch.ones(task.num_labels + 1)
            weights[-1] = NO_OBJECT
            found[f"det_losses.{MMF_NAMES[task.name][1]}.empty_weight"] = weights
    return found


def from_detr(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[UnitConfig, State]:
    """DETR with a ResNet of bottlenecks (detr-r50-dc5 and its kin) -> ours: one task, no text encoder, no task tokens.

    Raises:
        TriviumError: as `from_mmf`.
    """
    state = {name: tensor for name, tensor in state.items() if not _IGNORED.search(name)}
    labels, queries = (_shape(state, name, "DETR")[0] for name in ("class_embed.weight", "query_embed.weight"))
    beside = tasks_beside(config) or {"coco": {}}
    if len(beside) > 1:
        raise TriviumError(f"a DETR has one task, and its config.json names {', '.join(beside)}")
    [(name, said)] = beside.items()
    ours = replace(
        _image_config(state, "", "transformer.decoder.", config, "DETR"),
        tasks=(replace(UnitTask(name, "detection", "image", labels - 1, 0, queries), **said),),
        text_layers=0, num_task_tokens=0, residual=False,
    )  # fmt: skip
    return ours, take(state, detr_places(ours), _shapes(ours), "DETR")


def to_detr(state: Mapping[str, Tensor], config: UnitConfig) -> State:
    """What `from_detr` gave, back. A decoder of the task's own is the only one, and comes back as a shared one. Tensors
    may be views.

    Raises:
        TriviumError: a model that is no DETR.
    """
    task = config.tasks[0]
    wrong = {
        "several tasks": len(config.tasks) > 1, "no detection": task.kind != "detection",
        "attributes": task.num_attributes is not None, "a text encoder": bool(config.text_layers),
        "task tokens": bool(config.num_task_tokens), "a residual around its encoder": config.residual,
        "a decoder of another width": config.width != config.image_width,
        "a backbone that trains its norms": config.backbone_norm != "frozen" or not config.bottleneck,
        "anchors or positions of its own": not config.has_published_places,
    }  # fmt: skip
    if any(wrong.values()):
        raise TriviumError(f"this UniT has {next(what for what, is_so in wrong.items() if is_so)}, and DETR has not:"
                           " it cannot be written in DETR's layout")  # fmt: skip
    return give(state, detr_places(config))


def tokens_of(table_RD: Tensor, config: UnitConfig, side: Side) -> State:
    """A table of task tokens -> ours: those of the tasks that read this side, and the rows of no such task."""
    numbers = {task.number: task.name for task in config.readers(side)}
    spare = [row for row in range(len(table_RD)) if row not in numbers]
    tokens = {_token(side, name): table_RD[number : number + 1].clone() for number, name in numbers.items()}
    return tokens | {f"{_TOKENS[side]}.spare": table_RD[spare]}


def _table(state: Mapping[str, Tensor], config: UnitConfig, side: Side) -> Tensor:
    """What `tokens_of` took apart."""
    numbers = {task.number: task.name for task in config.readers(side)}
    spare = iter(state[f"{_TOKENS[side]}.spare"])
    rows = range(config.num_task_tokens)
    return torch.stack([state[_token(side, numbers[row])][0] if row in numbers else next(spare) for row in rows])


def _token(side: Side, task: str) -> str:
    return f"{_TOKENS[side]}.of.{task}.weight"


def build(config: UnitConfig, state: Mapping[str, Tensor]) -> Unit:
    """A model with these weights in float32."""
    with torch.device("meta"):
        model = Unit(config)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return model


def config_beside(config: UnitConfig) -> dict[str, Any]:
    """What of our config no shape shows, for the config.json beside the weights. Tasks keep their order: the first is
    meant where none is named."""
    tasks = {task.name: {field: getattr(task, field) for field in UNSEEN_OF_TASK} for task in config.tasks}
    return {field: getattr(config, field) for field in UNSEEN} | {"tasks": tasks}


def tasks_beside(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of tasks, by name. Raises TriviumError for what cannot be said of one."""
    tasks = config.get("tasks", {})
    said = list(tasks.values()) if isinstance(tasks, dict) else [tasks]
    if not all(map(_is_of_task, said)):
        raise TriviumError(f"its config.json must say of tasks, by name, one or more of {', '.join(UNSEEN_OF_TASK)}")
    return dict(tasks)


def _is_of_task(said: object) -> bool:
    if not isinstance(said, dict) or said.keys() - set(UNSEEN_OF_TASK):
        return False
    return all(
        value in _WORDS[field] if field in _WORDS else type(value) is int or (field, value) == ("max_length", None)
        for field, value in said.items()
    )


# ------------------------------------------------------------------------------------------------ the sizes


def config_of_mmf(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> UnitConfig:
    """Sizes as shapes tell them. Raises TriviumError where one does not, or a task is unknown."""
    filed = {match[2]: match[1] for match in map(_QUERIES.fullmatch, state) if match}
    known = {dataset: name for name, (_, dataset) in MMF_NAMES.items()}
    if unknown := sorted(filed.keys() - known.keys()):
        raise TriviumError(f"this UniT was trained on {unknown[0]}, which is none of {', '.join(known)}: its task"
                           " has no number here, so it cannot be opened")  # fmt: skip
    tasks, beside = [], tasks_beside(config)
    place = {name: n for n, name in enumerate(beside)}
    for task in sorted(PUBLISHED_TASKS, key=lambda task: place.get(task.name, len(place))):
        kind, dataset = MMF_NAMES[task.name]
        if dataset not in filed:
            continue
        head = f"class_embeds.{dataset}.weight" if kind == "detection" else f"classifiers.{kind}.{dataset}.1.weight"
        attributes = state.get(f"det_losses.{dataset}.attribute_head.attr_linear2.weight")
        tasks.append(replace(
            task,
            num_labels=_shape(state, head, "UniT")[0] - (kind == "detection"),
            num_queries=_shape(state, f"{_BASE}query_embeds.{kind}.{dataset}.weight", "UniT")[0],
            num_attributes=None if attributes is None else len(attributes),
            **beside.get(task.name, {}),
        ))  # fmt: skip
    if not tasks:
        raise TriviumError("this UniT checkpoint has the queries of no task")
    shared = f"{_BASE}transformer.decoder.norm.weight" in state
    of_first = f"decoders.{'.'.join(MMF_NAMES[tasks[0].name])}."
    decoder = f"{_BASE}transformer.{'decoder.' if shared else of_first}"
    text = "bert_model.module."
    words, inner = (_shape(state, f"{text}{name}.weight", "UniT") for name in
                    ("embeddings.word_embeddings", "encoder.layer.0.intermediate.dense"))  # fmt: skip
    tokens = state.get(f"{_BASE}transformer.task_embeddings_enc.weight")
    attribute_classes = [t for name, t in state.items() if name.endswith("attribute_head.cls_embed.weight")]
    return replace(
        _image_config(state, _BASE, decoder, config, "UniT"),
        tasks=tuple(tasks),
        decoder="shared" if shared else "separate",
        text_width=words[1],
        text_heads=config.get("text_heads", max(1, words[1] // HEAD_WIDTH)),
        text_mlp_width=inner[0],
        text_layers=_count(state, rf"{re.escape(text)}encoder\.layer\.(\d+)\."),
        vocab_size=words[0],
        max_length=_shape(state, f"{text}embeddings.position_embeddings.weight", "UniT")[0],
        num_segments=_shape(state, f"{text}embeddings.token_type_embeddings.weight", "UniT")[0],
        num_task_tokens=0 if tokens is None else len(tokens),
        attribute_width=attribute_classes[0].shape[1] if attribute_classes else UnitConfig.attribute_width,
    )


def _image_config(
    state: Mapping[str, Tensor], base: str, decoder: str, config: Mapping[str, Any], family: str
) -> UnitConfig:
    body = f"{base}backbone.0.body."
    if f"{body}layer1.0.conv3.weight" not in state:
        raise TriviumError(f"this {family} has no ResNet of bottlenecks: ResNet-50 and larger ones are supported")
    stages = range(1, 1 + _count(state, rf"{re.escape(body)}layer(\d+)\.", first=1))
    width, image_width = (
        _shape(state, f"{name}.norm1.weight", family)[0]
        for name in (f"{decoder}layers.0", f"{base}transformer.encoder.layers.0")
    )
    return UnitConfig(
        width=width,
        mlp_width=_shape(state, f"{decoder}layers.0.linear1.weight", family)[0],
        decoder_layers=_count(state, rf"{re.escape(decoder)}layers\.(\d+)\."),
        image_width=image_width,
        image_layers=_count(state, rf"{re.escape(base)}transformer\.encoder\.layers\.(\d+)\."),
        backbone_widths=tuple(_shape(state, f"{body}layer{n}.0.conv2.weight", family)[0] for n in stages),
        backbone_blocks=tuple(_count(state, rf"{re.escape(body)}layer{n}\.(\d+)\.") for n in stages),
        **{field: config[field] for field in UNSEEN if field in config},
    )


def _count(state: Mapping[str, Tensor], pattern: str, first: int = 0) -> int:
    return 1 + max((int(match[1]) for match in map(re.compile(pattern).match, state) if match), default=-1) - first


def _shape(state: Mapping[str, Tensor], name: str, family: str) -> Sequence[int]:
    if name not in state or not state[name].ndim:
        raise TriviumError(f"this {family} checkpoint {listed('misses', [name])}")
    return state[name].shape


def _shapes(config: UnitConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Unit(config).state_dict().items()}


# ------------------------------------------------------------------------------------------------ the table


def mmf_places(config: UnitConfig) -> Iterator[Place]:
    """Where every tensor of a released checkpoint stands here, but for task tokens (see `tokens_of`)."""
    transformer = f"{_BASE}transformer."
    yield from _image_places(config, _BASE)
    if config.width != config.image_width:
        yield from pair("image_to_decoder", f"{transformer}enc2dec_proj")
        yield from pair("image_places", f"{transformer}pos_embed_proj")
    own = [f"{transformer}decoders.{'.'.join(MMF_NAMES[task.name])}." for task in config.tasks]
    if config.decoder == "shared":
        yield from _decoder_places(config, "shared", (f"{transformer}decoder.", *own))
    else:
        for task, theirs in zip(config.tasks, own, strict=True):
            yield from _decoder_places(config, task.name, (theirs,))
    for name, sources in bert.places(config.text_encoder):
        there = tuple(source.replace("bert.", "bert_model.module.", 1) for source in sources)
        if name.startswith("embeddings."):
            yield Place(f"text.{name}", (*there, there[0].replace("module.", "")), "tied")
        else:
            yield Place(f"text.{name}", there, "stacked" if len(there) > 1 else "plain")
    yield from pair("text_to_decoder", "bert_projection")
    yield from pair("text_places", "bert_pos_projection")
    for task in config.tasks:
        kind, dataset = MMF_NAMES[task.name]
        yield Place(f"queries.{task.name}.weight", (f"{_BASE}query_embeds.{kind}.{dataset}.weight",))
        if task.kind == "detection":
            attributes = f"det_losses.{dataset}.attribute_head."
            yield from _detection_places(task, f"class_embeds.{dataset}", f"bbox_embeds.{dataset}", attributes)
            continue
        ours, theirs = f"heads.{task.name}", f"classifiers.{kind}.{dataset}"
        yield from pair(f"{ours}.transform", f"{theirs}.0.dense")
        yield from pair(f"{ours}.norm", f"{theirs}.0.LayerNorm")
        yield from pair(f"{ours}.decoder", f"{theirs}.1")


def detr_places(config: UnitConfig) -> Iterator[Place]:
    """Where every tensor of a DETR stands here."""
    [task] = config.tasks
    yield from _image_places(config, "")
    yield from _decoder_places(config, "shared" if config.decoder == "shared" else task.name, ("transformer.decoder.",))
    yield Place(f"queries.{task.name}.weight", ("query_embed.weight",))
    yield from _detection_places(task, "class_embed", "bbox_embed", "")


def _image_places(config: UnitConfig, base: str) -> Iterator[Place]:
    body = f"{base}backbone.0.body."
    yield from _convolution_places("image.backbone.stem", f"{body}conv1", f"{body}bn1")
    for stage, count in enumerate(config.backbone_blocks):
        for number in range(count):
            ours, theirs = f"image.backbone.stages.{stage}.{number}", f"{body}layer{stage + 1}.{number}"
            for n in range(3):
                yield from _convolution_places(
                    f"{ours}.convolutions.{n}", f"{theirs}.conv{n + 1}", f"{theirs}.bn{n + 1}"
                )
            if number == 0:
                yield from _convolution_places(f"{ours}.shortcut", f"{theirs}.downsample.0", f"{theirs}.downsample.1")
    shape = (config.image_width, 4 * config.backbone_widths[-1], 1, 1)
    yield Place("image.projection.weight", (f"{base}input_proj.weight",), shape=shape)
    yield Place("image.projection.bias", (f"{base}input_proj.bias",))
    for n in range(config.image_layers):
        yield from _block_places(f"image.blocks.{n}", (f"{base}transformer.encoder.layers.{n}",), has_memory=False)


def _convolution_places(ours: str, convolution: str, norm: str) -> Iterator[Place]:
    yield Place(f"{ours}.conv.weight", (f"{convolution}.weight",))
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield Place(f"{ours}.norm.{part}", (f"{norm}.{part}",))


def _decoder_places(config: UnitConfig, ours: str, theirs: tuple[str, ...]) -> Iterator[Place]:
    """theirs: the names of one decoder; several where it is shared."""
    for n in range(config.decoder_layers):
        yield from _block_places(f"decoders.{ours}.blocks.{n}", tuple(f"{t}layers.{n}" for t in theirs), True)
    yield from _tied(f"decoders.{ours}.norm", theirs, "norm")


def _block_places(ours: str, theirs: tuple[str, ...], has_memory: bool) -> Iterator[Place]:
    attentions = {"attention": "self_attn"} | ({"cross_attention": "multihead_attn"} if has_memory else {})
    norms = ("attention_norm", *(("cross_attention_norm",) if has_memory else ()), "mlp_norm")
    for name, there in attentions.items():
        for part in ("weight", "bias"):
            yield Place(f"{ours}.{name}.qkv.{part}", tuple(f"{t}.{there}.in_proj_{part}" for t in theirs), "tied")
        yield from _tied(f"{ours}.{name}.out", tuple(f"{t}." for t in theirs), f"{there}.out_proj")
    for name, there in (("mlp_in", "linear1"), ("mlp_out", "linear2")):
        yield from _tied(f"{ours}.{name}", tuple(f"{t}." for t in theirs), there)
    for n, name in enumerate(norms, start=1):
        yield from _tied(f"{ours}.{name}", tuple(f"{t}." for t in theirs), f"norm{n}")


def _tied(ours: str, theirs: tuple[str, ...], name: str) -> Iterator[Place]:
    for part in ("weight", "bias"):
        yield Place(f"{ours}.{part}", tuple(f"{t}{name}.{part}" for t in theirs), "tied")


def _detection_places(task: UnitTask, classes: str, boxes: str, attributes: str) -> Iterator[Place]:
    ours = f"heads.{task.name}"
    yield from pair(f"{ours}.classes", classes)
    for n in range(3):
        yield from pair(f"{ours}.boxes.{n}", f"{boxes}.layers.{n}")
    if task.num_attributes is not None:
        yield Place(f"{ours}.attributes.classes.weight", (f"{attributes}cls_embed.weight",))
        yield from pair(f"{ours}.attributes.inner", f"{attributes}attr_linear1")
        yield from pair(f"{ours}.attributes.decoder", f"{attributes}attr_linear2")
