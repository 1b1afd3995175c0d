"""`trivium.load(path)`: a trained model with all that it takes to use it; pictures and strings in, tensors out.

    bundle = trivium.load("runs/shop")
    image, text = bundle.encode_image(["mug.jpg"]), bundle.encode_text(["a red mug", "a blue cup"])
    similarity = image.projected @ text.projected.T
    belongs = bundle.match("mug.jpg", "a red mug")

A *model folder* holds config.json, model.safetensors (or shards of it and their index), preprocessor.json, where there
is one tokenizer.json, labels.json and image_tokenizer.safetensors, and a manifest.json with the checksum of each.

B batch, C channels, H height, W width, T text tokens.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from trivium.convert import Foreign, flava, read_foreign
from trivium.convert.processor import transform_from_hf
from trivium.convert.weights import State, listed, read_json, read_weights
from trivium.data.tokenizer import Tokenizer
from trivium.data.transforms import ImageTransform, normalize
from trivium.errors import TriviumError
from trivium.manifest import newest_checkpoint, verify_manifest, write_manifest, written_beside
from trivium.models.dvae import DVae, DVaeConfig
from trivium.models.flava import Encoded, Flava, FlavaConfig
from trivium.models.image_tokenizer import ImageTokenizer
from trivium.models.patch_codebook import PatchCodebook
from trivium.tensor_files import SHARD_BYTES, save_tensors

FAMILIES: dict[str, tuple[type[Any], type[nn.Module]]] = {"flava": (FlavaConfig, Flava)}
Picture = str | Path | bytes | Image.Image | np.ndarray
Pictures = Picture | Sequence[Picture] | Tensor
Strings = str | Sequence[str]


@dataclass
class Bundle:
    """A model with its tokenizer, image transform, image tokenizer and label names.

    Nothing here trains: every method runs in eval mode without gradients, on the device where the model is.
    """

    family: str
    model: nn.Module
    tokenizer: Tokenizer | None
    transform: ImageTransform
    image_tokenizer: ImageTokenizer | None = None
    labels: list[str] | None = None
    max_length: int = 512  # tokens of a text, with [CLS] and [SEP]; longer ones are cut
    false_pairs: float | None = None  # share of them when matching was trained; None: not known

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def encode_image(self, pictures: Pictures, batch: int = 32) -> Encoded:
        """One picture or several -> `Encoded` of B rows.

        Args:
            pictures: paths, encoded bytes, Pillow pictures or uint8 arrays [H, W, 3], prepared by `transform`; or a
                tensor [B, 3, H, W], uint8 or float in [0, 1], taken as it is.
            batch: pictures that go through the model at once.
        """
        if isinstance(pictures, str | Path | bytes | Image.Image | np.ndarray):
            pictures = [pictures]
        return self._joined(list(self.images(pictures, batch)), "no picture to encode")

    def images(self, pictures: Iterable[Picture] | Tensor, batch: int = 32) -> Iterator[Encoded]:
        """`encode_image` piece by piece, reading pictures only when their turn comes: for more than memory holds."""
        rest = iter(pictures)
        while several := list(islice(rest, batch)):
            pixels_BCHW = torch.stack([self._pixels(one, pictures) for one in several]).to(self.device)
            if pixels_BCHW.is_floating_point():
                if not 0 <= float(pixels_BCHW.min()) <= float(pixels_BCHW.max()) <= 1:
                    raise TriviumError("float pixels must lie in [0, 1]: divide by 255, and do not normalise them")
                pixels_BCHW = pixels_BCHW * 255
            dtype = next(self.model.parameters()).dtype
            with _evaluating(self.model):
                mean, std = self.transform.mean, self.transform.std
                yield _settled(self.model.encode_image(normalize(pixels_BCHW, mean, std, dtype)))  # type: ignore[operator]

    def encode_text(self, texts: Strings, batch: int = 64) -> Encoded:
        """One string or several -> `Encoded` of B rows, padded to the longest (at most `max_length` tokens)."""
        if self.tokenizer is None:
            raise TriviumError(
                "this checkpoint came without a tokenizer: set bundle.tokenizer = Tokenizer.from_file(...) to the one "
                "that it was trained with"
            )
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            return self._joined([], "no text to encode")
        ids_BT, mask_BT = self.tokenizer.pad(self.tokenizer.encode(texts, self.max_length))
        parts = []
        for ids, mask in zip(ids_BT.split(batch), mask_BT.split(batch), strict=True):
            with _evaluating(self.model):
                encode = self.model.encode_text
                parts.append(_settled(encode(ids.to(self.device), mask.to(self.device))))  # type: ignore[operator]
        return self._joined(parts, "no text to encode")

    def fuse(self, image: Encoded, text: Encoded) -> Encoded:
        """Pictures and texts read together, row by row; a single picture or text is paired with every row."""
        rows = max(len(image.states), len(text.states))
        for name, encoded in (("pictures", image), ("texts", text)):
            if len(encoded.states) not in (1, rows):
                raise TriviumError(f"{len(image.states)} pictures and {len(text.states)} texts do not pair up: give as "
                                   f"many {name} as the others, or one")  # fmt: skip
        with _evaluating(self.model):
            return _settled(self.model.fuse(_repeated(image, rows), _repeated(text, rows)))  # type: ignore[operator]

    def match(self, pictures: Pictures | Encoded, texts: Strings | Encoded) -> Tensor:
        """Probability [B] that picture and text of a row belong together."""
        image = pictures if isinstance(pictures, Encoded) else self.encode_image(pictures)
        text = texts if isinstance(texts, Encoded) else self.encode_text(texts)
        fused = self.fuse(image, text)
        with _evaluating(self.model):
            return self.model.match(fused).float().softmax(-1)[:, 1]  # type: ignore[operator]

    def save(
        self, folder: str | Path, weights: Mapping[str, Tensor] | None = None, shard_bytes: int = SHARD_BYTES
    ) -> None:
        """Write a model folder: beside, then renamed into place. `folder` must not exist, or be empty.

        Args:
            weights: written in place of the model's own: a copy of them, say, while the model trains on.
            shard_bytes: weights that take more are written in several files with an index.

        Raises:
            TriviumError: the folder holds something, or cannot be written; nothing half-written stays.
        """
        with written_beside(Path(folder)) as beside:
            config = {
                "family": self.family,
                "model": self.model.config_dict(),  # type: ignore[operator]
                "max_length": self.max_length,
                "false_pairs": self.false_pairs,
                "image_tokenizer": _tokenizer_entry(self.image_tokenizer),
            }
            _write(beside / "config.json", json.dumps(config, indent=1) + "\n")
            weights = self.model.state_dict() if weights is None else weights
            save_tensors(weights, beside / "model.safetensors", shard_bytes)
            _write(beside / "preprocessor.json", self.transform.to_json())
            if self.tokenizer is not None:
                self.tokenizer.save(beside / "tokenizer.json")
            if self.labels is not None:
                _write(beside / "labels.json", json.dumps(self.labels, indent=1, ensure_ascii=False) + "\n")
            if self.image_tokenizer is not None:
                save_tensors(self.image_tokenizer.state_dict(), beside / "image_tokenizer.safetensors")
            write_manifest(beside)

    def _pixels(self, picture: Picture | Tensor, given: Any) -> Tensor:
        """uint8 or float [3, H, W] of one picture."""
        if isinstance(given, Tensor):
            assert isinstance(picture, Tensor)
            if given.ndim != 4 or given.shape[1] != 3:
                raise TriviumError(f"a tensor of pictures is [B, 3, H, W], this one {list(given.shape)}")
            patch: int = self.model.config.patch_size  # type: ignore[union-attr, assignment]
            if given.shape[2] % patch or given.shape[3] % patch:
                raise TriviumError(
                    f"pictures of {given.shape[2]} x {given.shape[3]} pixels cannot be cut into patches of {patch}:"
                    " resize them to multiples of it"
                )
            return picture
        if isinstance(picture, str | Path):
            try:
                return self.transform(Path(picture).read_bytes())
            except (OSError, ValueError) as error:
                raise TriviumError(f"{picture}: cannot be read as a picture ({error}): leave it out") from None
        if isinstance(picture, np.ndarray) and not (picture.dtype == np.uint8 and picture.shape[2:] == (3,)):
            raise TriviumError(f"an array is uint8 [H, W, 3], this one {picture.dtype} {list(picture.shape)}")
        if not isinstance(picture, bytes | np.ndarray | Image.Image):
            raise TriviumError(
                f"a picture is a path, bytes, a Pillow picture or an array, not {type(picture).__name__}"
            )
        try:
            return self.transform(picture)
        except ValueError as error:
            raise TriviumError(f"a picture cannot be decoded ({error}): leave it out") from None

    def _joined(self, parts: list[Encoded], nothing: str) -> Encoded:
        if not parts:
            raise TriviumError(f"{nothing}: the list is empty")
        if len(parts) == 1:
            return parts[0]
        masks = [part.mask for part in parts if part.mask is not None]
        whole = Encoded(
            torch.cat([part.states for part in parts]), torch.cat(masks) if masks else None, parts[0]._norm,
            parts[0]._projection,
        )  # fmt: skip
        with _evaluating(self.model):
            return _settled(whole)


# ------------------------------------------------------------------------------------------------------- opening


def load(path: str | Path, device: str | torch.device = "cpu") -> Bundle:
    """Open a trained model.

    Args:
        path: a run folder (its newest sound checkpoint), a checkpoint, a model folder, or a foreign checkpoint (a
            file or a folder; see `trivium.convert`), which is converted in memory.

    Raises:
        TriviumError: nothing there, damaged files (named), another family; one sentence.
    """
    said: list[str] = []
    folder = model_folder(Path(path), said)
    if folder is not None:
        bundle = open_own(folder)
    else:
        bundle, said = bundle_of(read_foreign(Path(path)))
    for sentence in said:
        warnings.warn(sentence, stacklevel=2)
    bundle.model.to(device)
    if bundle.image_tokenizer is not None:
        bundle.image_tokenizer.to(device)
    return bundle


def load_image_tokenizer(path: str | Path, device: str | torch.device = "cpu") -> ImageTokenizer:
    """The image tokenizer of anything that `load` takes, or one alone (DALL-E's files, FlavaImageCodebook).

    Raises:
        TriviumError: as `load`; or there is none.
    """
    folder = model_folder(Path(path), [])
    tokenizer = read_foreign(Path(path)).image_tokenizer if folder is None else _own_image_tokenizer(folder)
    if tokenizer is None:
        raise TriviumError(f"{path} holds no image tokenizer")
    return tokenizer.to(device)


def image_tokenizer_hash(tokenizer: ImageTokenizer) -> str:
    """A name for exactly this image tokenizer: sha256 over its kind, its settings and its tensors."""
    digest = hashlib.sha256(json.dumps(_tokenizer_entry(tokenizer), sort_keys=True).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_image_tokenizer(tokenizer: ImageTokenizer, folder: str | Path) -> None:
    """A folder with an image tokenizer alone: config.json, image_tokenizer.safetensors and a manifest."""
    with written_beside(Path(folder)) as beside:
        config = {"family": "image_tokenizer", "image_tokenizer": _tokenizer_entry(tokenizer)}
        _write(beside / "config.json", json.dumps(config, indent=1) + "\n")
        save_tensors(tokenizer.state_dict(), beside / "image_tokenizer.safetensors")
        write_manifest(beside)


def model_folder(path: Path, said: list[str]) -> Path | None:
    """The model folder that a run, a checkpoint or itself stands for, checked; None for anything foreign.

    said: gets a sentence for each damaged checkpoint of a run that was passed over.
    """
    if not path.exists():
        raise TriviumError(f"{path} does not exist: name a run folder, a model folder or a file of weights")
    if (path / "checkpoints").is_dir():
        checkpoint = newest_checkpoint(path / "checkpoints", said.append, "model")
        if checkpoint is not None:
            return checkpoint / "model"
        raise TriviumError(f"{path} has no sound checkpoint{''.join(f'; {sentence}' for sentence in said)}")
    folder = path / "model" if (path / "model" / "config.json").is_file() else path
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
    tokenizer = folder / "tokenizer.json"
    return Bundle(
        family=family,
        model=model.eval(),
        tokenizer=Tokenizer.from_file(tokenizer) if tokenizer.is_file() else None,
        transform=ImageTransform.from_json(_text(folder / "preprocessor.json")),
        image_tokenizer=_own_image_tokenizer(folder),
        labels=_labels(folder / "labels.json"),
        max_length=int(config.get("max_length", model_config.max_length)),
        false_pairs=config.get("false_pairs"),  # folders of older versions do not say it
    )


def _labels(path: Path) -> list[str] | None:
    if not path.is_file():
        return None
    try:
        labels = json.loads(_text(path))
    except json.JSONDecodeError:
        labels = None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise TriviumError(f"{path} is damaged: it must hold a JSON list of the labels' names")
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


def bundle_of(foreign: Foreign) -> tuple[Bundle, list[str]]:
    """A foreign checkpoint made ready to use, and the sentences that the user is to read."""
    if foreign.config is None:
        raise TriviumError(f"{foreign.folder} holds an image tokenizer alone: open it with load_image_tokenizer")
    model, drawn = flava.build(foreign.config, foreign.state)
    said = list(foreign.said)
    if drawn:
        said.append(f"not in the file and therefore drawn at random (seed 0): {', '.join(drawn)}")
    folder = foreign.folder
    settings = next((folder / name for name in ("preprocessor_config.json", "processor_config.json")
                     if (folder / name).is_file()), None)  # fmt: skip
    transform = ImageTransform(size=foreign.config.image_size)
    if settings is not None:
        transform = ImageTransform(**transform_from_hf(read_json(settings)))
    return Bundle(
        family="flava",
        model=model.eval(),
        tokenizer=foreign_tokenizer(folder),
        transform=transform,
        image_tokenizer=foreign.image_tokenizer,
        max_length=foreign.config.max_length,
    ), said


def load_bert(path: str | Path) -> tuple[State, Tokenizer | None]:
    """The tensors of a BERT in Hugging Face's layout (a folder or a file), and the tokenizer that lies with them."""
    path = Path(path)
    return read_weights(path), foreign_tokenizer(path if path.is_dir() else path.parent)


def start_text(model: Flava, bert: State) -> tuple[list[str], list[str]]:
    """Give FLAVA's text side what a BERT has for it (see `convert.flava.text_from_bert`).

    Returns:
        The names of our tensors that were set, and of BERT's that were left out.
    """
    taken, left = flava.text_from_bert(bert, model.config)
    model.load_state_dict({name: tensor.float() for name, tensor in taken.items()}, strict=False)
    return sorted(taken), left


def foreign_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer.json or vocab.txt in a folder, where there is one."""
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(folder / "tokenizer.json")
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


def _tokenizer_entry(tokenizer: ImageTokenizer | None) -> dict[str, Any] | None:
    return None if tokenizer is None else {"kind": tokenizer.kind, **tokenizer.config_dict()}


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards the mode that was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _settled(encoded: Encoded) -> Encoded:
    """Everything that `Encoded` would compute at first use is computed now, where no gradient is recorded."""
    _ = encoded.tokens, encoded.pooled
    if encoded._projection is not None:
        _ = encoded.projected
    return encoded


def _repeated(encoded: Encoded, rows: int) -> Encoded:
    if len(encoded.states) == rows:
        return encoded
    mask = None if encoded.mask is None else encoded.mask.expand(rows, -1)
    return Encoded(encoded.states.expand(rows, -1, -1), mask, encoded._norm, encoded._projection)


class _CallableModule(ModuleType):
    """Importing `trivium.load` puts this module where users expect the function: so calling it is calling that."""

    def __call__(self, path: str | Path, device: str | torch.device = "cpu") -> Bundle:
        return load(path, device)


sys.modules[__name__].__class__ = _CallableModule
