"""`trivium.load(path)`: a trained model with all that it takes to use it; pictures and strings in, tensors out.

    bundle = trivium.load("runs/shop")
    image, text = bundle.encode_image(["mug.jpg"]), bundle.encode_text(["a red mug", "a blue cup"])
    similarity = image.projected @ text.projected.T
    belongs = bundle.match("mug.jpg", "a red mug")

What it returns is a Bundle (bundle/); what it opens may be of another library (convert/).
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from trivium.bundle import Bundle
from trivium.bundle.model_folder import image_tokenizer_entry
from trivium.bundle.untrained import MATCHING, among
from trivium.convert import Foreign, bert, flava, read_foreign
from trivium.convert.processor import transform_from_hf
from trivium.convert.weights import State, listed, read_json, read_weights
from trivium.data.tokenizer import Tokenizer
from trivium.data.transforms import ImageTransform
from trivium.errors import TriviumError
from trivium.hub import located
from trivium.manifest import newest_checkpoint, verify_manifest, write_manifest, written_beside
from trivium.models.albef import Albef, AlbefConfig
from trivium.models.bert import Bert, BertConfig
from trivium.models.clip import Clip, ClipConfig
from trivium.models.dino import Dino, DinoConfig
from trivium.models.dvae import DVae, DVaeConfig
from trivium.models.encoded import EncodesImage
from trivium.models.finetuned import HeadConfig
from trivium.models.flava import Flava, FlavaConfig
from trivium.models.image_tokenizer import ImageTokenizer
from trivium.models.patch_codebook import PatchCodebook
from trivium.models.unit import Unit, UnitConfig
from trivium.models.vit import ViT, ViTConfig
from trivium.tensor_files import save_tensors

FAMILIES: dict[str, tuple[type[Any], type[nn.Module]]] = {
    "flava": (FlavaConfig, Flava),
    "clip": (ClipConfig, Clip),
    "vit": (ViTConfig, ViT),
    "dino": (DinoConfig, Dino),
    "bert": (BertConfig, Bert),
    "albef": (AlbefConfig, Albef),
    "unit": (UnitConfig, Unit),
}

# ------------------------------------------------------------------------------------------------------- opening


def load(path: str | Path, device: str | torch.device = "cpu") -> Bundle:
    """Open a trained model.

    Args:
        path: a run folder (its newest sound checkpoint), a checkpoint, a model folder, or a foreign checkpoint (a
            file or a folder, or "hf-hub:owner/name"; see `trivium.convert`), which is converted in memory.

    Raises:
        TriviumError: nothing there, damaged files (named), another family; one sentence.
    """
    said: list[str] = []
    path = located(path)
    folder = model_folder(path, said)
    if folder is not None:
        bundle = open_own(folder)
    else:
        foreign = read_foreign(path)
        bundle, said = bundle_of(foreign), foreign.said
    for sentence in said:
        warnings.warn(sentence, stacklevel=2)
    bundle.model.to(device)
    if bundle.head is not None:
        bundle.head.to(device)
    if bundle.image_tokenizer is not None:
        bundle.image_tokenizer.to(device)
    return bundle


def load_image_tokenizer(path: str | Path, device: str | torch.device = "cpu") -> ImageTokenizer:
    """The image tokenizer of anything that `load` takes, or one alone (DALL-E's files, FlavaImageCodebook).

    Raises:
        TriviumError: as `load`; or there is none.
    """
    path = located(path)
    folder = model_folder(path, [])
    tokenizer: ImageTokenizer | None
    if folder is None:
        foreign = read_foreign(path)
        family, tokenizer = foreign.family, foreign.image_tokenizer
    else:
        family, tokenizer = str(read_json(folder / "config.json").get("family")), _own_image_tokenizer(folder)
    if tokenizer is None:
        raise TriviumError(f"{path} holds no image tokenizer: it is a model of the family {family}")
    return tokenizer.to(device)


def image_tokenizer_alone(folder: Path) -> ImageTokenizer | None:
    """What a model folder of ours holds, where that is an image tokenizer and no model; else None."""
    alone = read_json(folder / "config.json").get("family") == "image_tokenizer"
    return _own_image_tokenizer(folder) if alone else None


def image_tokenizer_hash(tokenizer: ImageTokenizer) -> str:
    """A name for exactly this image tokenizer: sha256 over its kind, its settings and its tensors."""
    digest = hashlib.sha256(json.dumps(image_tokenizer_entry(tokenizer), sort_keys=True).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_image_tokenizer(
    tokenizer: ImageTokenizer, folder: str | Path, weights: Mapping[str, Tensor] | None = None
) -> None:
    """A folder with an image tokenizer alone: config.json, image_tokenizer.safetensors and a manifest.

    weights: written in place of its own: a copy of them, say, while it trains on.
    """
    with written_beside(Path(folder)) as beside:
        config = {"family": "image_tokenizer", "image_tokenizer": image_tokenizer_entry(tokenizer)}
        (beside / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        save_tensors(tokenizer.state_dict() if weights is None else weights, beside / "image_tokenizer.safetensors")
        write_manifest(beside)


def model_folder(path: Path, said: list[str]) -> Path | None:
    """The model folder that a run, a checkpoint or itself stands for, checked; None for anything foreign.

    said: gets a sentence for each damaged checkpoint of a run that was passed over.
    """
    if not path.exists():
        raise TriviumError(f"{path} does not exist: name a run folder, a model folder or a file of weights")
    chose = (path / "model" / "config.json").is_file()  # a run that keeps its best checkpoint has it there
    if (path / "checkpoints").is_dir() and not chose:
        checkpoint = newest_checkpoint(path / "checkpoints", said.append, "model")
        if checkpoint is not None:
            return checkpoint / "model"
        raise TriviumError(f"{path} has no sound checkpoint{''.join(f'; {sentence}' for sentence in said)}")
    folder = path / "model" if chose else path
    own = (folder / "config.json").is_file() and "family" in read_json(folder / "config.json")
    if not own and not (folder / "manifest.json").is_file():
        return None
    verify_manifest(folder)
    return folder


def open_own(folder: Path) -> Bundle:
    """A model folder that was checked."""
    config = read_json(folder / "config.json")
    family = config.get("family")
    if family == "image_tokenizer":
        raise TriviumError(f"{folder} holds an image tokenizer alone: open it with load_image_tokenizer")
    if family not in FAMILIES:
        raise TriviumError(f"{folder / 'config.json'}: no family {family!r} is known: {', '.join(FAMILIES)} are")
    make_config, make_model = FAMILIES[family]
    model_config = _made(make_config, config.get("model"), folder / "config.json")
    with torch.device("meta"):
        model = make_model(model_config)
    _put(read_weights(folder), model, folder / "model.safetensors")
    head_config = None if "head" not in config else _made(HeadConfig, config["head"], folder / "config.json")
    head = None
    if head_config is not None:
        head = head_config.build()
        _put(read_weights(folder / "head.safetensors"), head, folder / "head.safetensors")
    tokenizer, preprocessor = folder / "tokenizer.json", folder / "preprocessor.json"
    reads_pictures = isinstance(model, EncodesImage)
    labels = _labels(folder / "labels.json")
    return Bundle(
        family=family,
        model=model.eval(),
        tokenizer=Tokenizer.from_file(tokenizer) if tokenizer.is_file() else None,
        transform=ImageTransform.from_json(_text(preprocessor)) if reads_pictures else ImageTransform(),
        image_tokenizer=_own_image_tokenizer(folder),
        labels=labels if isinstance(labels, list) else None,
        labels_of=labels if isinstance(labels, dict) else None,
        max_length=int(config.get("max_length", getattr(model_config, "max_length", Bundle.max_length))),
        false_pairs=config.get("false_pairs"),  # folders of older versions do not say it
        fusion_trained=config.get("fusion_trained"),  # likewise
        # Where no loss reached what reads both, none reached the head that judges it: older folders say the one alone.
        untrained=tuple(config.get("untrained", MATCHING if config.get("fusion_trained") is False else ())),
        head=None if head is None else head.eval(),
        head_config=head_config,
        tuned_for=tuple(config.get("tuned_for", ())),
    )


def _labels(path: Path) -> list[str] | dict[str, list[str]] | None:
    """The names of the labels, or those of each task."""
    if not path.is_file():
        return None
    try:
        labels = json.loads(_text(path))
    except json.JSONDecodeError:
        labels = None
    lists = list(labels.values()) if isinstance(labels, dict) else [labels]
    if not all(isinstance(each, list) and all(isinstance(label, str) for label in each) for each in lists):
        raise TriviumError(f"{path} is damaged: it must hold a JSON list of the labels' names, or one for each task")
    return labels


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TriviumError(f"{path} is damaged: it is no UTF-8 text ({error})") from None


def _own_image_tokenizer(folder: Path) -> ImageTokenizer | None:
    entry = read_json(folder / "config.json").get("image_tokenizer")
    if not entry:
        return None
    kind, settings = entry.get("kind"), {name: value for name, value in entry.items() if name != "kind"}
    path = folder / "image_tokenizer.safetensors"
    state = read_weights(path)
    if kind == PatchCodebook.kind:
        codebook = PatchCodebook(**settings)
        _put(state, codebook, path)
        return codebook
    if kind != DVae.kind:
        raise TriviumError(
            f"{folder / 'config.json'}: no image tokenizer {kind!r} is known: dvae and patch_codebook are"
        )
    with torch.device("meta"):
        dvae = DVae(_made(DVaeConfig, settings, folder / "config.json"))
    _put(state, dvae, path)
    return dvae.frozen()


def bundle_of(foreign: Foreign) -> Bundle:
    """A foreign checkpoint made ready to use. What the user is to read of it: `foreign.said`."""
    if foreign.model is None:
        raise TriviumError(f"{foreign.folder} holds an image tokenizer alone: open it with load_image_tokenizer")
    folder = foreign.folder
    settings = next((folder / name for name in ("preprocessor_config.json", "processor_config.json")
                     if (folder / name).is_file()), None)  # fmt: skip
    transform = foreign.transform
    if settings is not None:
        transform = transform_from_hf(read_json(settings), foreign.transform)
    tokenizer = foreign_tokenizer(folder)
    if foreign.captions and tokenizer is not None:
        tokenizer = tokenizer.for_captions()
    labels, listed_beside = foreign.labels, folder / "answer_list.json"  # of a head that writes answers
    if foreign.head_config is not None and foreign.head_config.gives == "text" and listed_beside.is_file():
        listed = _labels(listed_beside)
        if isinstance(listed, dict):
            raise TriviumError(f"{listed_beside} names labels of several tasks: it must be a JSON list of the answers")
        labels = listed
    labels_of, named_beside = foreign.labels_of, folder / "labels.json"  # of a UniT's tasks that its file leaves unsaid
    if foreign.family == "unit" and named_beside.is_file():
        named = _labels(named_beside)
        if not isinstance(named, dict):
            raise TriviumError(f'{named_beside} names no task: it must hold a JSON object, such as {{"vqav2": [...]}}')
        labels_of = (labels_of or {}) | named
    return Bundle(
        family=foreign.family,
        model=foreign.model.eval(),
        tokenizer=tokenizer,
        transform=ImageTransform(**transform),
        image_tokenizer=foreign.image_tokenizer,
        labels=labels,
        max_length=_tokens_read(folder, foreign.max_length),
        untrained=among(foreign.drawn),
        head=foreign.head,
        head_config=foreign.head_config,
        labels_of=labels_of,
        tuned_for=foreign.tuned_for,
    )


def _tokens_read(folder: Path, places: int) -> int:
    """Tokens of a text that a foreign model reads: those that it has places for, or fewer where the settings of its
    tokenizer say so, as of a model that was trained on short texts. Hugging Face writes 1e30 for no such limit."""
    settings = folder / "tokenizer_config.json"
    stated = read_json(settings).get("model_max_length") if settings.is_file() else None
    return min(places, int(stated)) if isinstance(stated, int | float) and 3 <= stated < math.inf else places


def start_text(model: Flava, start: Bert) -> tuple[list[str], list[str]]:
    """Give FLAVA's text side what a BERT has for it (see `convert.flava.text_from_bert`).

    Returns:
        The names of our tensors that were set, and of BERT's, as Hugging Face calls them, that were left out.
    """
    taken, left = flava.text_from_bert(bert.to_hf(start.state_dict(), start.config), model.config)
    model.load_state_dict(taken, strict=False)
    return sorted(taken), left


def foreign_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer.json, CLIP's vocab.json and merges.txt, or BERT's vocab.txt in a folder, where there is one."""
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(folder / "tokenizer.json")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return Tokenizer.from_vocabulary_and_merges(folder / "vocab.json", folder / "merges.txt")
    if not (folder / "vocab.txt").is_file():
        return None
    pieces = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    settings = folder / "tokenizer_config.json"
    return Tokenizer.wordpiece(pieces, read_json(settings).get("do_lower_case", True) if settings.is_file() else True)


# ---------------------------------------------------------------------------------------------- small things


def _put(state: State, module: nn.Module, path: Path) -> None:
    """Give a module the tensors of a file; every name must agree."""
    expected = module.state_dict()
    missing, left = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    different = sorted(name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape)
    found = [listed("misses", missing), listed("has unexpected", left), listed("has other shapes for", different)]
    if any(found):
        raise TriviumError(f"{path} does not fit its config.json: it {' and '.join(part for part in found if part)}")
    module.load_state_dict(state, assign=True)


def _made(make: type[Any], values: Any, where: Path) -> Any:
    known = {field.name for field in fields(make)}
    if not isinstance(values, Mapping) or set(values) - known:
        unknown = sorted(set(values) - known) if isinstance(values, Mapping) else values
        raise TriviumError(f"{where}: {make.__name__} has no {unknown}: was this written by a newer version?")
    return make(**values)


class _CallableModule(ModuleType):
    """Importing `trivium.load` puts this module where users expect the function: so calling it is calling that."""

    def __call__(self, path: str | Path, device: str | torch.device = "cpu") -> Bundle:
        return load(path, device)


sys.modules[__name__].__class__ = _CallableModule
