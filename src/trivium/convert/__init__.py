"""Foreign weights in and out: one adapter per layout, all in one dict, each tested both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trivium.convert import bert, dalle, flava, torchmultimodal
from trivium.convert.weights import PICKLES, State, read_json, read_weights
from trivium.errors import TriviumError
from trivium.models.bert import Bert
from trivium.models.dvae import DVae
from trivium.models.flava import Flava, FlavaConfig


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


@dataclass(frozen=True)
class Adapter:
    """One layout."""

    family: str  # of the models that it holds
    mark: str  # a regular expression that one of its keys fits, and no key of another layout
    read: Callable[[State, Mapping[str, Any]], Foreign]  # tensors and the config.json beside ({} without)
    write: Callable[[Any, DVae | None], tuple[State, dict[str, Any]]] | None  # a model -> tensors and config.json
    pads_visible: bool = False  # whether its multimodal encoder attends the pads of a text


def _flava(config: FlavaConfig, state: State, image_tokenizer: DVae | None, said: list[str]) -> Foreign:
    model, drawn = flava.build(config, state)
    if drawn:
        said = [*said, f"not in the file and therefore drawn at random (seed 0): {', '.join(drawn)}"]
    return Foreign("flava", model, image_tokenizer, said, config.max_length, {"size": config.image_size})


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
    return _flava(ours, tensors, dalle.from_dalle(codebook) if codebook else None, said)


def _write_torchmultimodal(model: Flava, image_tokenizer: DVae | None) -> tuple[State, dict[str, Any]]:
    state = torchmultimodal.to_torchmultimodal(model.state_dict(), model.config)
    if image_tokenizer is not None:
        codebook = dalle.to_dalle(image_tokenizer)
        state |= {f"image_codebook.encoder.{name}": tensor for name, tensor in codebook.items()}
    return state, torchmultimodal.config_to_torchmultimodal(model.config)


def _read_dalle(state: State, config: Mapping[str, Any]) -> Foreign:
    return Foreign("image_tokenizer", None, dalle.from_dalle(dalle.codebook_of(state)))


def _read_bert(state: State, config: Mapping[str, Any]) -> Foreign:
    if not config:
        raise TriviumError("Hugging Face's layout needs the config.json of the model beside its weights: add it")
    model, said = bert.build(*bert.from_hf(state, config))
    return Foreign("bert", model, None, said, model.config.max_length)


def _write_bert(model: Bert, image_tokenizer: DVae | None) -> tuple[State, dict[str, Any]]:
    return bert.to_hf(model.state_dict(), model.config), bert.config_to_hf(model.config)


ADAPTERS = {
    "torchmultimodal-flava": Adapter(
        "flava",
        r"(model\.)?(image|text|mm)_encoder\.(encoder|embeddings)\..*",
        _read_torchmultimodal,
        _write_torchmultimodal,
        pads_visible=True,
    ),
    "hf-flava": Adapter(
        "flava", r"(flava\.)?(image|text|multimodal)_model\..*|blocks\.group_1\.group\..*", _read_hf, _write_hf
    ),
    "hf-bert": Adapter(
        "bert", r"(bert\.|0\.auto_model\.)?embeddings\.word_embeddings\.weight", _read_bert, _write_bert
    ),
    "dalle": Adapter("image_tokenizer", r"(encoder\.)?blocks\.group_1\.block_1\..*", _read_dalle, None),
}
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
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    try:
        found = ADAPTERS[from_ or _layout(state, config)].read(state, config)
    except TriviumError as error:
        raise TriviumError(f"{path}: {error}") from None
    found.folder = folder
    return found


def _layout(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    for name, adapter in ADAPTERS.items():
        if any(re.fullmatch(adapter.mark, key) for key in state):
            return name
    keys = sorted(state)
    says = f', and config.json says model_type "{config["model_type"]}"' if "model_type" in config else ""
    raise TriviumError(
        f"the {len(keys)} tensors ({', '.join(keys[:5])}, ...) are in none of the layouts {', '.join(ADAPTERS)}{says}"
    )


def _one_file(folder: Path, stem: str) -> Path | None:
    files = (folder / f"{stem}{suffix}" for suffix in (".safetensors", *PICKLES))
    return next((file for file in files if file.is_file()), None)
