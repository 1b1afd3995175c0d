"""Foreign weights in and out: one adapter per layout, all in one dict, each tested both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trivium.convert import albef, beit, bert, clip, dalle, flava, processor, torchmultimodal, unit, vit
from trivium.convert.unit_labels import labels_of
from trivium.convert.weights import PICKLES, State, read_json, read_weights
from trivium.errors import TriviumError
from trivium.models.albef import Albef
from trivium.models.bert import Bert
from trivium.models.clip import Clip, ClipConfig
from trivium.models.dino import Dino
from trivium.models.dvae import DVae
from trivium.models.finetuned import HeadConfig
from trivium.models.flava import Flava, FlavaConfig
from trivium.models.unit import Unit, UnitConfig
from trivium.models.vit import ViT, ViTConfig


@dataclass
class Foreign:
    """What a foreign checkpoint holds, in our words."""

    family: str
    model: nn.Module | None  # None: an image tokenizer alone
    image_tokenizer: DVae | None = None
    said: list[str] = field(default_factory=list)  # sentences that the user is to read
    max_length: int = 512  # tokens of a text
    transform: dict[str, Any] = field(default_factory=dict)  # of pictures, where no file beside the weights says it
    folder: Path = Path()  # where tokenizer and image settings may lie
    labels_of: dict[str, list[str]] | None = None  # names of the classes of each task
    captions: bool = False  # whether texts are read as ALBEF reads captions (see Tokenizer.for_captions)
    head: nn.Module | None = None  # of a fine-tuned model
    head_config: HeadConfig | None = None
    labels: list[str] | None = None  # of its outputs
    tuned_for: tuple[str, ...] = ()  # tasks without a head, for one of which it was fine-tuned
    drawn: list[str] = field(default_factory=list)  # parts of the model that the file lacks


@dataclass(frozen=True)
class Adapter:
    """One layout."""

    family: str  # of the models that it holds
    mark: str  # a regular expression that one of its keys fits, and no key of another layout
    read: Callable[[State, Mapping[str, Any]], Foreign]  # tensors and the config.json beside ({} without)
    write: Callable[[Any, DVae | None], tuple[State, dict[str, Any]]] | None  # a model -> tensors and config.json
    pads_visible: bool = False  # whether its multimodal encoder attends the pads of a text
    weights: str = "model.safetensors"  # how files of this layout are called, where it is written
    configs: tuple[str, ...] = ("config.json",)  # the first that lies there is read; the first of all is written
    tower_of: tuple[str, ...] = ()  # other families, of whose models it can hold the tower without the head
    # A fine-tuned model with its head, and the names of its labels; what comes back is None where it has no place.
    write_head: Callable[[Any, nn.Module, HeadConfig, Sequence[str]], tuple[State, dict[str, Any]] | None] | None = None
    # Parts of a model that it has no place for, written alone (None) or with such a head; None: it has one for all.
    lacks: Callable[[Any, HeadConfig | None], list[str]] | None = None


def _flava(config: FlavaConfig, state: State, image_tokenizer: DVae | None, said: list[str]) -> Foreign:
    model, drawn = flava.build(config, state)
    if drawn:
        said = [*said, f"not in the file and therefore drawn at random (seed 0): {', '.join(drawn)}"]
    transform = {"size": config.image_size}
    return Foreign("flava", model, image_tokenizer, said, config.max_length, transform, drawn=drawn)


def _read_hf(state: State, config: Mapping[str, Any]) -> Foreign:
    codebook = dalle.codebook_of(state)
    if len(codebook) == len(state):
        return Foreign("flava", None, _hf_codebook(codebook, config))
    if not config:
        raise TriviumError("Hugging Face's layout needs the config.json of the model beside its weights: add it")
    ours, tensors = flava.from_hf(state, config)
    tokenizer = _hf_codebook(codebook, config.get("image_codebook_config") or {}) if codebook else None
    return _flava(ours, tensors, tokenizer, [])


def _hf_codebook(state: State, config: Mapping[str, Any]) -> DVae:
    model = dalle.from_dalle(state)
    if config.get("num_groups", 4) != model.config.num_groups:  # there it enters the gain of the blocks alone
        raise TriviumError(
            f"config.json: an image codebook with num_groups {config['num_groups']} is not supported: 4 is"
        )
    return model


def _write_hf(model: Flava, image_tokenizer: DVae | None) -> tuple[State, dict[str, Any]]:
    state = flava.to_hf(model.state_dict(), model.config)
    if image_tokenizer is None:
        return state, flava.config_to_hf(model.config, None)
    codebook, config = dalle.to_hf(image_tokenizer)
    state |= {f"image_codebook.{name}": tensor for name, tensor in codebook.items()}
    return state, flava.config_to_hf(model.config, config)


def _read_torchmultimodal(state: State, config: Mapping[str, Any]) -> Foreign:
    codebook = dalle.codebook_of(state)
    ours, tensors = torchmultimodal.from_torchmultimodal(state, config.get("image_num_attention_heads"))
    said = [f"torchmultimodal's masked heads normalise with eps 1e-05, here with {ours.eps:g}"]
    if config.get("pads_visible"):
        ours = replace(ours, pads_visible=True)
    else:
        said.append("torchmultimodal's multimodal encoder sees the pads of a text, and this one is kept from them, so"
                    ' texts with pads are fused otherwise here; it sees them where a config.json with {"pads_visible":'
                    " true} lies beside the weights")  # fmt: skip
    return _flava(ours, tensors, dalle.from_dalle(codebook) if codebook else None, said)


def _write_torchmultimodal(model: Flava, image_tokenizer: DVae | None) -> tuple[State, dict[str, Any]]:
    state = torchmultimodal.to_torchmultimodal(model.state_dict(), model.config)
    if image_tokenizer is not None:
        codebook = dalle.to_dalle(image_tokenizer)
        state |= {f"image_codebook.encoder.{name}": tensor for name, tensor in codebook.items()}
    return state, torchmultimodal.config_to_torchmultimodal(model.config)


def _read_dalle(state: State, config: Mapping[str, Any]) -> Foreign:
    return Foreign("image_tokenizer", None, dalle.from_dalle(dalle.codebook_of(state)))


def _clip(config: ClipConfig, state: State, beside: Mapping[str, Any], said: list[str]) -> Foreign:
    """Pictures are prepared as open_clip's config says, else as for all published models: bicubic, middle square."""
    model, transform = clip.build(config, state), {"size": config.image_size, "crop": "center"}
    transform |= processor.transform_from_open_clip(beside.get("preprocess_cfg", {}))
    return Foreign("clip", model, None, said, config.max_length, transform)


def _read_hf_clip(state: State, config: Mapping[str, Any]) -> Foreign:
    if not config:
        raise TriviumError("Hugging Face's layout needs the config.json of the model beside its weights: add it")
    return _clip(*clip.from_hf(state, config), {}, [])


def _write_hf_clip(model: Clip, image_tokenizer: DVae | None) -> tuple[State, dict[str, Any]]:
    return clip.to_hf(model.state_dict(), model.config), clip.config_to_hf(model.config)


def _read_openai_clip(state: State, config: Mapping[str, Any]) -> Foreign:
    return _clip(*clip.from_openai(state, "quick_gelu", config), config, [])


def _read_open_clip(state: State, config: Mapping[str, Any]) -> Foreign:
    """Without a config beside it, as its own models are made: those that go on from OpenAI's weights are the others."""
    said = [
        "the activation is not in the file, and GELU is taken: for weights that want x sigmoid(1.702 x), such as"
        " OpenAI's and those trained from them, give --from openai-clip to trivium convert"
    ]
    known = "model_cfg" in config or "text_config" in config
    return _clip(*clip.from_openai(state, "gelu", config), config, [] if known else said)


def _write_open_clip(model: Clip, image_tokenizer: DVae | None) -> tuple[State, dict[str, Any]]:
    return clip.to_openai(model.state_dict(), model.config), clip.config_to_open_clip(model.config)


def _vit(config: ViTConfig, state: State, left: list[str], transform: dict[str, Any], said: list[str]) -> Foreign:
    model = ViT(config)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    if left:
        said = [f"left out, since the tower alone is taken: {', '.join(left)}", *said]
    return Foreign("vit", model, said=said, transform=transform)


def _read_hf_vit(state: State, config: Mapping[str, Any]) -> Foreign:
    half = (0.5, 0.5, 0.5)  # what its image processor has where no file beside the weights says it
    ours, tensors, left = vit.from_hf(state, config)
    transform = {"size": ours.image_size, "mean": half, "std": half, "crop": "squash", "filter": "bilinear"}
    return _vit(ours, tensors, left, transform, [])


def _read_timm_vit(state: State, config: Mapping[str, Any]) -> Foreign:
    ours, tensors, left = vit.from_timm(state, config)
    return _vit(ours, tensors, left, *processor.transform_from_timm(config, ours.image_size))


def _read_dino(state: State, config: Mapping[str, Any]) -> Foreign:
    ours, tensors = vit.from_dino(state, config)
    model = Dino(ours)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    transform, said = processor.transform_from_timm(config, ours.image_size)
    return Foreign("dino", model, said=said, transform=transform)


def _write_hf_vit(model: ViT | Dino, image_tokenizer: DVae | None) -> tuple[State, dict[str, Any]]:
    return vit.to_hf(model), vit.config_to_hf(model.config)


def _write_timm_vit(model: ViT | Dino, image_tokenizer: DVae | None) -> tuple[State, dict[str, Any]]:
    return vit.to_timm(model), vit.config_to_timm(model.config)


def _write_dino(model: Dino, image_tokenizer: DVae | None) -> tuple[State, dict[str, Any]]:
    return vit.to_dino(model), vit.config_to_timm(model.config)


def _read_beit(state: State, config: Mapping[str, Any]) -> Foreign:
    ours, tensors, said = beit.from_beit(state, config)
    model = ViT(ours)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return Foreign("vit", model, said=said, transform={"size": ours.image_size} | beit.PIXELS)


def _read_bert(state: State, config: Mapping[str, Any]) -> Foreign:
    if not config:
        raise TriviumError("Hugging Face's layout needs the config.json of the model beside its weights: add it")
    model, said = bert.build(*bert.from_hf(state, config))
    return Foreign("bert", model, None, said, model.config.max_length)


def _write_bert(model: Bert, image_tokenizer: DVae | None) -> tuple[State, dict[str, Any]]:
    return bert.to_hf(model.state_dict(), model.config), bert.config_to_hf(model.config)


def _read_albef(state: State, config: Mapping[str, Any]) -> Foreign:
    ours, tensors, layout = albef.from_official(state, config)
    model, drawn = albef.build(ours, tensors)
    of_head = {name: tensor.float() for name, tensor in tensors.items() if name.startswith("head.")}
    head, head_config, labels = None, albef.head_config(ours, layout, tensors, config), albef.LABELS.get(layout.head)
    if head_config is not None:
        head = head_config.build().eval()
        head.load_state_dict({name.removeprefix("head."): tensor for name, tensor in of_head.items()})
    beside = sorted({n.partition(".")[0] for n in tensors.keys() - model.state_dict().keys() - of_head.keys()})
    said = [f"left out, since the model has no place for it: {', '.join(beside)}"] if beside else []
    if drawn:
        said.append(f"not in the file and therefore drawn at random (seed 0): {', '.join(drawn)}")
    length = ours.max_length if layout.head else albef.CAPTION_TOKENS
    length = min(ours.max_length, config.get("max_length", length))
    return Foreign(
        "albef", model, None, said, length, {"size": ours.image_size}, captions=True, head=head,
        head_config=head_config, labels=None if labels is None else list(labels), tuned_for=albef.tuned_for(layout),
        drawn=drawn,
    )  # fmt: skip


def _write_albef(model: Albef, image_tokenizer: DVae | None) -> tuple[State, dict[str, Any]]:
    return albef.state_as(albef.PRETRAINED, model), {"num_attention_heads": model.config.num_heads}


def _write_albef_retrieval(model: Albef, image_tokenizer: DVae | None) -> tuple[State, dict[str, Any]]:
    return albef.state_as(albef.RETRIEVAL, model), {"num_attention_heads": model.config.num_heads}


def _write_albef_grounding(model: Albef, image_tokenizer: DVae | None) -> tuple[State, dict[str, Any]]:
    return albef.state_as(albef.GROUNDING, model), {"num_attention_heads": model.config.num_heads}


def _write_albef_head(
    model: Albef, head: nn.Module, config: HeadConfig, labels: Sequence[str]
) -> tuple[State, dict[str, Any]] | None:
    """As the file of its task, where the head is of the kind that it has; None where it is another."""
    layout = albef.layout_for(config)
    if layout is None:
        return None
    ordered = albef.in_official_order(head.state_dict(), labels, layout)
    beside: dict[str, Any] = {"num_attention_heads": model.config.num_heads}
    if config.gives == "text":
        beside["head"] = {name: getattr(config, name) for name in albef.UNSEEN_OF_WRITER}
    return albef.state_as(layout, model, ordered), beside


def _albef_lacks(model: Albef, head: HeadConfig | None) -> list[str]:
    layout = albef.PRETRAINED if head is None else albef.layout_for(head)
    assert layout is not None, "a head that was written has its layout"
    return albef.without_place(layout, model)


def _unit(config: UnitConfig, state: State, beside: Mapping[str, Any], said: list[str]) -> Foreign:
    if "dilated" not in beside:
        said = [*said, "no tensor shows whether the last stage is dilated (DC5): it is taken to be, as in all released"
                ' UniTs; where it is not, put a config.json with {"dilated": false} beside the weights']  # fmt: skip
    labels = labels_of(config)
    return Foreign(
        "unit", unit.build(config, state), None, said, config.max_length, unit.TRANSFORM, labels_of=labels or None
    )


def _read_mmf(state: State, config: Mapping[str, Any]) -> Foreign:
    pooler = [name for name in state if name.startswith("bert_model.module.pooler.")]
    said = [f"left out, since nothing reads it: {', '.join(sorted(pooler))}"] if pooler else []
    return _unit(*unit.from_mmf(state, config), config, said)


def _write_mmf(model: Unit, image_tokenizer: DVae | None) -> tuple[State, dict[str, Any]]:
    return unit.to_mmf(model.state_dict(), model.config), unit.config_beside(model.config)


def _read_detr(state: State, config: Mapping[str, Any]) -> Foreign:
    return _unit(*unit.from_detr(state, config), config, [])


def _write_detr(model: Unit, image_tokenizer: DVae | None) -> tuple[State, dict[str, Any]]:
    return unit.to_detr(model.state_dict(), model.config), unit.config_beside(model.config)


_OPEN_CLIP = ("open_clip_config.json", "config.json")  # the second is Hugging Face's

ADAPTERS = {
    "albef": Adapter(
        "albef", r"visual_encoder\.blocks\..*", _read_albef, _write_albef,
        write_head=_write_albef_head, lacks=_albef_lacks,
    ),
    "albef-retrieval": Adapter(
        "albef", r"visual_encoder\.blocks\..*", _read_albef, _write_albef_retrieval,
        lacks=lambda model, _: albef.without_place(albef.RETRIEVAL, model),
    ),
    "albef-grounding": Adapter(
        "albef", r"visual_encoder\.blocks\..*", _read_albef, _write_albef_grounding,
        lacks=lambda model, _: albef.without_place(albef.GROUNDING, model),
    ),
    "torchmultimodal-flava": Adapter(
        "flava",
        r"(model\.)?(image|text|mm)_encoder\.(encoder|embeddings)\..*",
        _read_torchmultimodal,
        _write_torchmultimodal,
        pads_visible=True,
    ),
    "hf-flava": Adapter(
        "flava", r"(flava\.)?(image|multimodal)_model\..*|blocks\.group_1\.group\..*", _read_hf, _write_hf
    ),
    "hf-clip": Adapter("clip", r"vision_model\.(encoder|embeddings)\..*", _read_hf_clip, _write_hf_clip),
    # The same names: OpenAI's archives hold the size of their pictures beside the weights.
    "openai-clip": Adapter("clip", r"input_resolution", _read_openai_clip, None, configs=_OPEN_CLIP),
    "open-clip": Adapter(
        "clip",
        r"visual\..*",
        _read_open_clip,
        _write_open_clip,
        weights="open_clip_model.safetensors",
        configs=_OPEN_CLIP,
    ),
    "beit": Adapter(  # before timm's, most of whose names it has
        "vit", r"(beit\.encoder\.layer|blocks)\.\d+\.(attention\.attention\.query\.bias|attn\.q_bias)", _read_beit, None
    ),
    "hf-vit": Adapter(
        "vit",
        r"((vit|deit)\.)?embeddings\.patch_embeddings\.projection\.weight",
        _read_hf_vit,
        _write_hf_vit,
        tower_of=("dino",),
    ),
    "timm-vit": Adapter("vit", r"patch_embed\.proj\.weight", _read_timm_vit, _write_timm_vit, tower_of=("dino",)),
    "dino": Adapter("dino", r"backbone\.patch_embed\.proj\.weight", _read_dino, _write_dino),
    "hf-bert": Adapter(
        "bert", r"(bert\.|0\.auto_model\.)?embeddings\.word_embeddings\.weight", _read_bert, _write_bert
    ),
    "mmf-unit": Adapter("unit", r"(unit_base_model|detr_model)\.query_embeds\..*", _read_mmf, _write_mmf),
    "detr": Adapter("unit", r"backbone\.0\.body\.conv1\.weight", _read_detr, _write_detr),
    "dalle": Adapter("image_tokenizer", r"(encoder\.)?blocks\.group_1\.block_1\..*", _read_dalle, None),
}  # fmt: skip
FORMATS = ("trivium", *(name for name, adapter in ADAPTERS.items() if adapter.write))


def read_foreign(path: Path, from_: str | None = None) -> Foreign:
    """A checkpoint of another library: a file, or a folder that holds one. Its layout is told by its keys.

    Args:
        from_: the layout by name, instead.

    Raises:
        TriviumError: no weights, a damaged file, another family, or one that does not fit its config.
    """
    if from_ is not None and from_ not in ADAPTERS:
        raise TriviumError(f"no layout is called {from_!r}: choose one of {', '.join(ADAPTERS)}, or leave it out")
    if path.is_dir() and (encoder := _one_file(path, "encoder")):  # DALL-E's files
        decoder = _one_file(path, "decoder")
        image_tokenizer = dalle.from_dalle(read_weights(encoder), read_weights(decoder) if decoder else None)
        return Foreign("image_tokenizer", None, image_tokenizer)
    folder = path if path.is_dir() else path.parent
    state = read_weights(path)
    try:
        adapter = ADAPTERS[from_ or _layout(state, folder)]
        config = next((read_json(folder / name) for name in adapter.configs if (folder / name).is_file()), {})
        found = adapter.read(state, config)
    except TriviumError as error:
        raise TriviumError(f"{path}: {error}") from None
    found.folder = folder
    return found


def _layout(state: Mapping[str, Tensor], folder: Path) -> str:
    for name, adapter in ADAPTERS.items():
        if any(re.fullmatch(adapter.mark, key) for key in state):
            return name
    keys = sorted(state)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    says = f', and config.json says model_type "{config["model_type"]}"' if "model_type" in config else ""
    raise TriviumError(
        f"the {len(keys)} tensors ({', '.join(keys[:5])}, ...) are in none of the layouts {', '.join(ADAPTERS)}{says}"
    )


def _one_file(folder: Path, stem: str) -> Path | None:
    files = (folder / f"{stem}{suffix}" for suffix in (".safetensors", *PICKLES))
    return next((file for file in files if file.is_file()), None)
