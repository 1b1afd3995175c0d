"""CLIP from folder to folder, as a user converts: each layout opens, computes the same, and is written again."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.byte_pairs import PAIRS, openai_file
from tests.convert.peers import shuffled
from trivium.cli.convert import convert
from trivium.convert import clip
from trivium.data.tokenizer import Tokenizer
from trivium.errors import TriviumError
from trivium.load import load
from trivium.models.clip import ClipConfig

PICTURES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
TEXTS = ["the dog in the snow", "a dog"]
SIZE = ClipConfig(
    image_width=64, image_layers=2, image_heads=1, image_mlp_width=80, text_width=64, text_layers=2, text_heads=1,
    text_mlp_width=72, image_size=32, patch_size=8, vocab_size=512 + len(PAIRS) + 2, max_length=20,
    end_id=512 + len(PAIRS) + 1, projection_width=24,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Hugging Face's own library saves a model and its tokenizer."""
    path = tmp_path_factory.mktemp("hugging-face")
    peer = shuffled(transformers.CLIPModel(transformers.CLIPConfig(**clip.config_to_hf(SIZE))))
    peer.save_pretrained(path / "clip")
    tokenizer = Tokenizer.from_file(openai_file(path))
    vocabulary = json.loads(tokenizer._tokenizer.to_str())["model"]["vocab"]
    transformers.CLIPTokenizer(vocab=vocabulary, merges=list(PAIRS)).save_pretrained(path / "clip")
    return path / "clip"


def embedded(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    bundle = load(path)
    return bundle.encode_image(list(PICTURES)).projected, bundle.encode_text(TEXTS).projected


def same(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_loaded_folder_embeds_as_the_library_that_wrote_it(folder: Path) -> None:
    peer = transformers.CLIPModel.from_pretrained(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    bundle = load(folder)
    assert bundle.family == "clip" and bundle.max_length == 20
    assert (bundle.transform.size, bundle.transform.crop) == (32, "center")
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (bundle.transform.mean, bundle.transform.std))
    pixels = (torch.from_numpy(PICTURES).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        out = peer(pixel_values=pixels, **tokenizer(TEXTS, padding=True, return_tensors="pt"))
    image, text = embedded(folder)
    assert torch.allclose(image, out.image_embeds, atol=1e-5)
    assert torch.allclose(text, out.text_embeds, atol=1e-5)


def test_there_and_back_through_every_layout(folder: Path, tmp_path: Path) -> None:
    before = embedded(folder)
    convert(folder, to="trivium", out=tmp_path / "ours")
    convert(tmp_path / "ours", to="open-clip", out=tmp_path / "open")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its config says the activation: there is nothing to warn of
        assert same(embedded(tmp_path / "open"), before)
    convert(tmp_path / "open", to="hf-clip", out=tmp_path / "hf")
    assert same(embedded(tmp_path / "hf"), before)
    theirs, again = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "hf"))
    assert theirs.keys() == again.keys() and all(torch.equal(theirs[name], again[name]) for name in theirs)
    peer, report = transformers.CLIPModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values()), report
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "hf")
    inputs = processor(text=TEXTS, images=list(PICTURES), padding=True, return_tensors="pt")
    with torch.no_grad():
        out = peer(**inputs)
    assert torch.allclose(out.image_embeds, before[0], atol=1e-4)
    assert torch.allclose(out.text_embeds, before[1], atol=1e-5)
    described = json.loads((tmp_path / "open" / "open_clip_config.json").read_text())
    assert described["model_cfg"]["quick_gelu"] is True
    assert described["preprocess_cfg"]["resize_mode"] == "shortest"


@pytest.mark.parametrize("size", [32, 40])
def test_pictures_of_any_shape_are_prepared_as_the_file_of_the_published_weights_says(
    folder: Path, tmp_path: Path, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """It gives sizes as plain numbers."""
    copytree(folder, tmp_path / "hf")
    settings = {"feature_extractor_type": "CLIPFeatureExtractor", "size": size, "crop_size": 32, "do_center_crop": True}
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(settings))
    picture = np.random.default_rng(1).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = transformers.CLIPModel.from_pretrained(folder).get_image_features(
            **CLIPImageProcessorPil.from_pretrained(tmp_path / "hf")(picture, return_tensors="pt")
        )
    expected = getattr(expected, "pooler_output", expected)
    convert(tmp_path / "hf", to="trivium", out=tmp_path / "ours")
    for layout in ("hf", "ours"):
        embedded = load(tmp_path / layout).encode_image([picture]).projected
        assert torch.allclose(embedded, F.normalize(expected, dim=-1), atol=1e-5)
    convert(tmp_path / "ours", to="open-clip", out=tmp_path / "open")
    lost = "no place for a resize to 40 pixels before the middle is cut out; pictures are resized to 32 there"
    assert (lost in capsys.readouterr().out) == (size == 40)


def test_openai_s_state_dict_is_told_by_its_sizes_and_open_clip_s_says_what_it_lacks(
    folder: Path, tmp_path: Path
) -> None:
    names = clip.to_openai(load(folder).model.state_dict(), SIZE)
    save_file({name: tensor.contiguous() for name, tensor in names.items()}, tmp_path / "open.safetensors")
    sizes = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(20), "vocab_size": torch.tensor(528)}
    torch.save({**names, **sizes}, tmp_path / "openai.pt")
    expected = load(folder).encode_image(list(PICTURES)).projected
    assert torch.equal(load(tmp_path / "openai.pt").encode_image(list(PICTURES)).projected, expected)
    with pytest.warns(UserWarning, match="the activation is not in the file, and GELU is taken"):
        other = load(tmp_path / "open.safetensors")
    assert not torch.allclose(other.encode_image(list(PICTURES)).projected, expected, atol=1e-4)
    convert(tmp_path / "open.safetensors", to="trivium", from_="openai-clip", out=tmp_path / "named")
    assert torch.equal(load(tmp_path / "named").encode_image(list(PICTURES)).projected, expected)
    assert load(tmp_path / "named").tokenizer is None


def test_hugging_face_s_config_is_taken_by_its_own_weights_alone(folder: Path, tmp_path: Path) -> None:
    """Folders of open_clip's models on a hub hold both layouts with a config each."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "open_clip_config.json").write_text(json.dumps(clip.config_to_open_clip(ClipConfig())))
    assert same(embedded(tmp_path), embedded(folder))


def test_a_family_is_written_in_its_own_layouts_alone(folder: Path, tmp_path: Path) -> None:
    convert(folder, to="trivium", out=tmp_path / "ours")
    with pytest.raises(TriviumError, match="hf-flava is a layout of flava, and this model is of the family clip"):
        convert(tmp_path / "ours", to="hf-flava", out=tmp_path / "flava")
    with pytest.raises(TriviumError, match='model_type "clip" where "flava" is needed'):
        convert(folder, to="trivium", from_="hf-flava", out=tmp_path / "flava")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(TriviumError, match=r"needs the config\.json"):
        load(tmp_path / "bare")
