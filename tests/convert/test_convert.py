"""From folder to folder, as a user converts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.models.flava.image_processing_pil_flava import FlavaImageProcessorPil

import trivium
from tests.convert import peers
from trivium.cli.convert import convert
from trivium.convert import dalle, read_foreign
from trivium.errors import TriviumError
from trivium.load import load, load_image_tokenizer, save_image_tokenizer
from trivium.manifest import verify_manifest
from trivium.models.dvae import DVae, DVaeConfig
from trivium.models.flava import Flava
from trivium.models.patch_codebook import PatchCodebook

PICTURES = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
TEXTS = ["a red mug.", "cats on the mat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hugging-face") / "flava"
    peers.save_with_tokenizer(peers.pretraining(), path)
    return path


def same(first: Path, second: Path) -> bool:
    a, b = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_there_and_back_through_every_layout(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(folder, to="trivium", out=tmp_path / "ours")
    convert(tmp_path / "ours", to="torchmultimodal-flava", out=tmp_path / "tmm")
    convert(tmp_path / "tmm", to="trivium", out=tmp_path / "ours-2")
    assert "eps 1e-05" in capsys.readouterr().out
    convert(tmp_path / "ours-2", to="hf-flava", out=tmp_path / "hf")
    assert same(tmp_path / "ours", tmp_path / "ours-2")
    peer = transformers.FlavaForPreTraining.from_pretrained(folder)
    again, report = transformers.FlavaForPreTraining.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values()), report
    expected = peer.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_the_processor_loads_and_prepares_as_the_bundle_does(folder: Path, tmp_path: Path) -> None:
    convert(folder, to="trivium", out=tmp_path / "ours")
    convert(tmp_path / "ours", to="hf-flava", out=tmp_path / "hf")
    processor = transformers.FlavaProcessor.from_pretrained(tmp_path / "hf")
    bundle = load(tmp_path / "ours")
    wanted = {"return_codebook_pixels": True, "return_image_mask": True}
    theirs = processor(text=TEXTS, images=list(PICTURES), padding=True, return_tensors="pt", **wanted)
    assert bundle.tokenizer is not None
    ids, mask = bundle.tokenizer.pad(bundle.tokenizer.encode(TEXTS, 24))
    assert torch.equal(theirs["input_ids"], ids)
    assert torch.equal(theirs["attention_mask"].bool(), mask)
    assert theirs["pixel_values"].shape == (2, 3, 32, 32)
    assert theirs["bool_masked_pos"].shape == (2, 4, 4)
    assert theirs["codebook_pixel_values"].shape == (2, 3, 32, 32)  # a 4 x 4 grid of stride 8
    peer = transformers.FlavaForPreTraining.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        out = peer.flava(**{name: theirs[name] for name in ("input_ids", "attention_mask", "pixel_values")},
                         output_hidden_states=True)  # fmt: skip
    image, text = bundle.encode_image(list(PICTURES)), bundle.encode_text(TEXTS)
    assert torch.allclose(image.tokens, out.image_embeddings, atol=2e-4)  # their resizing differs in the last bit
    assert torch.allclose(text.tokens[mask], out.text_embeddings[mask], atol=1e-5)
    reference = FlavaImageProcessorPil(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})
    assert np.allclose(reference(list(PICTURES))["pixel_values"], theirs["pixel_values"])


def test_shards_and_pickles_of_hugging_face(folder: Path, tmp_path: Path) -> None:
    peer = transformers.FlavaForPreTraining.from_pretrained(folder)
    peer.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    (tmp_path / "pickle").mkdir()
    torch.save(peer.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    (tmp_path / "pickle" / "config.json").write_text((folder / "config.json").read_text())
    for name in ("shards", "pickle"):
        convert(tmp_path / name, to="hf-flava", out=tmp_path / f"{name}-2")
    convert(folder, to="hf-flava", out=tmp_path / "plain")
    assert same(tmp_path / "shards-2", tmp_path / "plain")
    assert same(tmp_path / "pickle-2", tmp_path / "plain")


def test_shards_of_our_own_and_back(folder: Path, tmp_path: Path) -> None:
    convert(folder, to="trivium", out=tmp_path / "whole")
    convert(tmp_path / "whole", to="trivium", out=tmp_path / "shards", shard_mb=0.1)
    names = sorted(path.name for path in (tmp_path / "shards").glob("model*.safetensors"))
    assert len(names) > 2
    assert names == [f"model-{n:05d}-of-{len(names):05d}.safetensors" for n in range(len(names))]
    verify_manifest(tmp_path / "shards")
    convert(tmp_path / "shards", to="trivium", out=tmp_path / "back")
    for file in sorted(path.name for path in (tmp_path / "whole").iterdir()):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "back" / file).read_bytes(), file
    one, two = load(tmp_path / "whole").model.state_dict(), load(tmp_path / "shards").model.state_dict()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    (tmp_path / "shards" / names[1]).write_bytes(b"cut")
    with pytest.raises(TriviumError, match=names[1]):
        load(tmp_path / "shards")


@pytest.mark.parametrize("layout", ["hf-flava", "torchmultimodal-flava"])
def test_shards_of_other_layouts(folder: Path, tmp_path: Path, layout: str) -> None:
    convert(folder, to=layout, out=tmp_path / "shards", shard_mb=0.2)
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    for name in ("shards", "whole"):
        convert(folder if name == "whole" else tmp_path / name, to="trivium", out=tmp_path / f"from-{name}")
    assert same(tmp_path / "from-shards", tmp_path / "from-whole")
    if layout == "hf-flava":
        peer = transformers.FlavaForPreTraining.from_pretrained(folder).state_dict()
        again = transformers.FlavaForPreTraining.from_pretrained(tmp_path / "shards").state_dict()
        assert all(torch.equal(tensor, again[name]) for name, tensor in peer.items())


def test_a_bare_model_says_what_was_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peers.shuffled(transformers.FlavaModel(peers.config())).save_pretrained(tmp_path / "bare")
    convert(tmp_path / "bare", to="trivium", out=tmp_path / "ours")
    said = capsys.readouterr().out
    assert "not in the file and therefore drawn at random (seed 0): mim_head, mlm_head" in said
    with pytest.warns(UserWarning, match="drawn at random"):
        load(tmp_path / "bare")
    convert(tmp_path / "ours", to="hf-flava", out=tmp_path / "hf")
    assert "left out: the tokenizer files" in capsys.readouterr().out


def test_an_image_codebook_alone(tmp_path: Path) -> None:
    config = transformers.FlavaImageCodebookConfig(hidden_size=8, vocab_size=20)
    peer = peers.shuffled(transformers.FlavaImageCodebook(config))
    peer.save_pretrained(tmp_path / "codebook")
    convert(tmp_path / "codebook", to="trivium", out=tmp_path / "ours")
    tokenizer = load_image_tokenizer(tmp_path / "ours")
    assert isinstance(tokenizer, DVae)
    back, _ = dalle.to_hf(tokenizer)
    assert all(torch.equal(tensor, back[name]) for name, tensor in peer.state_dict().items())
    pixels = torch.rand(2, 3, 16, 16)
    assert torch.equal(load_image_tokenizer(tmp_path / "codebook").encode(pixels), tokenizer.encode(pixels))
    for path in ("codebook", "ours"):
        with pytest.raises(TriviumError, match=r"image tokenizer alone.*load_image_tokenizer"):
            load(tmp_path / path)
    for path in ("codebook", "ours"):
        convert(tmp_path / path, to="hf-flava", out=tmp_path / f"hf of {path}")
        again = transformers.FlavaImageCodebook.from_pretrained(tmp_path / f"hf of {path}")
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in peer.state_dict().items())
    with pytest.raises(TriviumError, match="torchmultimodal-flava has no place for an image tokenizer"):
        convert(tmp_path / "codebook", to="torchmultimodal-flava", out=tmp_path / "mm")


def test_encoder_and_decoder_go_to_the_names_of_dalle_and_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = peers.shuffled(DVae(DVaeConfig(width=8, num_codes=20, code_width=6, decoder=True)))
    save_image_tokenizer(model, tmp_path / "ours")
    convert(tmp_path / "ours", to="dalle", out=tmp_path / "dalle")
    files = {part: load_file(tmp_path / "dalle" / f"{part}.safetensors") for part in ("encoder", "decoder")}
    assert all("blocks.group_4.block_2.res_path.conv_4.w" in state for state in files.values())
    convert(tmp_path / "dalle", to="trivium", out=tmp_path / "back")
    for name in ("config.json", "image_tokenizer.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    capsys.readouterr()
    convert(tmp_path / "ours", to="hf-flava", out=tmp_path / "hf")
    assert "left out: hf-flava has no place for the decoder" in capsys.readouterr().out
    save_image_tokenizer(PatchCodebook(4, 8), tmp_path / "patches")
    with pytest.raises(TriviumError, match="dalle has no place for an image tokenizer of the kind patch_codebook"):
        convert(tmp_path / "patches", to="dalle", out=tmp_path / "nothing")
    peers.pretraining().save_pretrained(tmp_path / "flava")
    with pytest.raises(TriviumError, match="dalle is a layout of image tokenizers"):
        convert(tmp_path / "flava", to="dalle", out=tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("layout", ["hf-flava", "torchmultimodal-flava"])
@pytest.mark.parametrize("pads_visible", [False, True])
def test_pads_that_are_seen_in_one_layout_alone_are_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str, pads_visible: bool
) -> None:
    bundle = load(folder)
    assert isinstance(bundle.model, Flava)
    bundle.model.config = replace(bundle.model.config, pads_visible=pads_visible)
    bundle.save(tmp_path / "ours")
    convert(tmp_path / "ours", to=layout, out=tmp_path / "out")
    said = [line for line in capsys.readouterr().out.splitlines() if "pads_visible" in line]
    sees_them_there = layout == "torchmultimodal-flava"  # transformers hides what its attention_mask hides
    assert len(said) == (pads_visible != sees_them_there)
    if said:
        seen = "sees the pads" if sees_them_there else "is kept from the pads"
        assert f"{layout} has no place for pads_visible; its multimodal encoder {seen}" in said[0]


def test_pads_that_torchmultimodal_sees_are_said_or_seen_as_its_config_asks(folder: Path, tmp_path: Path) -> None:
    convert(folder, to="torchmultimodal-flava", out=tmp_path / "tmm")
    hidden = read_foreign(tmp_path / "tmm")
    assert "sees the pads of a text, and this one is kept from them" in " ".join(hidden.said)
    settings = tmp_path / "tmm" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"pads_visible": True}))
    seen = read_foreign(tmp_path / "tmm")
    assert isinstance(hidden.model, Flava) and isinstance(seen.model, Flava)
    assert seen.model.config == replace(hidden.model.config, pads_visible=True) != hidden.model.config
    assert "pads" not in " ".join(seen.said)


def test_what_has_no_place_in_a_layout_is_left_out_aloud(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = load(folder)
    bundle.image_tokenizer = PatchCodebook(50, 8)
    bundle.save(tmp_path / "patches")
    convert(tmp_path / "patches", to="hf-flava", out=tmp_path / "hf")
    assert (
        "left out: hf-flava has no place for an image tokenizer of the kind patch_codebook" in capsys.readouterr().out
    )
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["init_codebook"] is False
    assert transformers.FlavaForPreTraining.from_pretrained(tmp_path / "hf").image_codebook is None
    bundle.image_tokenizer = DVae(DVaeConfig(width=8, num_codes=50, decoder=True))
    bundle.save(tmp_path / "decoder")
    convert(tmp_path / "decoder", to="torchmultimodal-flava", out=tmp_path / "tmm")
    assert "the decoder of the image tokenizer" in capsys.readouterr().out
    assert any(
        k.startswith("image_codebook.encoder.blocks.") for k in load_file(tmp_path / "tmm" / "model.safetensors")
    )


def test_a_model_reads_no_more_of_a_text_after_the_trip_than_before(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Places that no text reached in training are as they were drawn."""
    bundle = load(folder)
    places = bundle.max_length
    assert places == bundle.model.config.max_length, "Hugging Face's file says 1e30, which is no limit"
    bundle.max_length, bundle.false_pairs, bundle.fusion_trained = 7, 0.2, False
    bundle.save(tmp_path / "ours")
    convert(tmp_path / "ours", to="hf-flava", out=tmp_path / "hf")
    said = capsys.readouterr().out
    assert "left out: hf-flava has no place for false_pairs; the share of false ones" in said and "(0.2)" in said
    assert "left out: hf-flava has no place for fusion_trained; that no loss has reached" in said
    back = load(tmp_path / "hf")
    assert (back.max_length, back.model.config.max_length) == (7, places)
    words = " ".join(TEXTS * 4)
    torch.testing.assert_close(back.encode_text([words]).projected, bundle.encode_text([words]).projected)
    settings = tmp_path / "hf" / "tokenizer_config.json"
    for stated, read in ((10**30, places), (1e30, places), (places + 1, places), (9, 9), (0, places), (None, places)):
        settings.write_text(json.dumps({"model_max_length": stated}))
        assert load(tmp_path / "hf").max_length == read, stated


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda at: (at / "x.txt").write_text("hello"), "holds no weights"),
        (lambda at: transformers.GPT2Model(transformers.GPT2Config(
            vocab_size=9, n_positions=9, n_embd=8, n_layer=1, n_head=1)).save_pretrained(at),
         'in none of the layouts .* model_type "gpt2"'),
    ],
)  # fmt: skip
def test_foreign_folders_of_no_family_of_ours(tmp_path: Path, make: object, says: str) -> None:
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")  # type: ignore[operator]
    with pytest.raises(TriviumError, match=says):
        convert(tmp_path / "in", to="trivium", out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]  # nothing half-written


def test_mistakes_in_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TriviumError, match=r"no format is called 'onnx': choose one of trivium, .*hf-flava, .*hf-bert"):
        convert(folder, to="onnx", out=tmp_path / "out")
    with pytest.raises(TriviumError, match="no layout is called 'clip'"):
        convert(folder, to="trivium", out=tmp_path / "out", from_="clip")
    with pytest.raises(TriviumError, match="no FLAVA state dict in torchmultimodal's layout"):
        convert(folder, to="trivium", out=tmp_path / "out", from_="torchmultimodal-flava")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("precious")
    with pytest.raises(TriviumError, match="exists already and is not empty"):
        convert(folder, to="trivium", out=tmp_path / "taken")
    bundle = load(folder)
    bundle.image_tokenizer = PatchCodebook(50, 8)
    bundle.save(tmp_path / "patches")
    with pytest.raises(TriviumError, match="taken exists already and is not empty"):
        convert(tmp_path / "patches", to="hf-flava", out=tmp_path / "taken")
    assert capsys.readouterr().out == ""  # nothing is said to be left out of what is not written
    assert (tmp_path / "taken" / "mine").read_text() == "precious"
    (tmp_path / "alone").mkdir()
    weights = tmp_path / "alone" / "model.safetensors"
    weights.write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(TriviumError, match=r"needs the config\.json"):
        trivium.load(weights)
