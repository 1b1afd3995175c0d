from __future__ import annotations

import math
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from tests.convert import peers
from trivium.convert import dalle, read_foreign
from trivium.errors import TriviumError
from trivium.models.dvae import DVae, DVaeConfig

SMALL = DVaeConfig(width=8, num_codes=20, code_width=6, decoder=True)


def hugging_face_codebook() -> transformers.FlavaImageCodebook:
    config = transformers.FlavaImageCodebookConfig(hidden_size=8, vocab_size=20, num_blocks_per_group=3)
    peer = peers.shuffled(transformers.FlavaImageCodebook(config))
    with torch.no_grad():  # at the scale of initial weights and without biases, the codes differ from place to place
        for parameter in peer.parameters():
            parameter.mul_(20 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 1e-3)
    return peer


def test_the_codebook_of_hugging_face_comes_back_bit_equal_and_gives_the_same_codes() -> None:
    peer = hugging_face_codebook()
    theirs = dict(peer.state_dict())
    model = dalle.from_dalle(theirs)
    back, config = dalle.to_hf(model)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    assert transformers.FlavaImageCodebookConfig(**config).to_dict() == peer.config.to_dict()
    pixels = torch.rand(3, 3, 4, 3).repeat_interleave(8, 2).repeat_interleave(8, 3)
    mapped = 0.8 * pixels + 0.1
    with torch.no_grad():
        assert torch.allclose(model.encoder(mapped), peer(mapped), atol=1e-5)
    expected = peer.get_codebook_indices(mapped).flatten(1)
    assert expected.unique().numel() > 1
    assert torch.equal(model.encode(pixels), expected)


@pytest.mark.parametrize(
    "config", [SMALL, DVaeConfig(width=4, num_groups=2, blocks_per_group=1, num_codes=9, decoder=True)]
)
def test_dalle_names_both_ways_with_decoder(config: DVaeConfig) -> None:
    model = peers.shuffled(DVae(config))
    encoder, decoder = dalle.to_dalle(model), dalle.to_dalle(model, "decoder")
    assert {"blocks.input.w", "blocks.group_1.block_1.res_path.conv_4.b", "blocks.output.conv.w"} <= encoder.keys()
    assert "blocks.group_1.block_1.id_path.w" not in encoder  # the first group keeps its width ...
    assert "blocks.group_2.block_1.id_path.w" in encoder
    assert "blocks.group_1.block_1.id_path.w" in decoder  # ... and the decoder's first does not
    again = dalle.from_dalle(encoder, decoder)
    expected = model.state_dict()
    assert again.config == config
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def pickled_encoder(model: DVae, path: Path) -> None:
    """The way that DALL-E's files were made: a whole module of classes that are not installed here."""
    package = types.ModuleType("dall_e.encoder")

    class Encoder(nn.Module):
        pass

    class Conv2d(nn.Module):
        pass

    for kind in (Encoder, Conv2d):
        kind.__module__, kind.__qualname__ = "dall_e.encoder", kind.__name__
        setattr(package, kind.__name__, kind)
    sys.modules |= {"dall_e": types.ModuleType("dall_e"), "dall_e.encoder": package}
    try:
        root = Encoder()
        for name, tensor in dalle.to_dalle(model).items():
            module: nn.Module = root
            *middle, leaf = name.split(".")
            for part in middle:
                if part not in module._modules:
                    module.add_module(part, Conv2d() if part.startswith("conv") else nn.Sequential())
                module = module._modules[part]  # type: ignore[assignment]
            module.register_parameter(leaf, nn.Parameter(tensor.clone()))
        torch.save(root, path)
    finally:
        del sys.modules["dall_e"], sys.modules["dall_e.encoder"]


def test_the_pickled_module_of_dalle_is_read_without_its_package(tmp_path: Path) -> None:
    model = peers.shuffled(DVae(DVaeConfig(width=4, num_codes=7)))
    pickled_encoder(model, tmp_path / "encoder.pkl")
    for path in (tmp_path / "encoder.pkl", tmp_path):
        found = read_foreign(path)
        assert found.model is None
        assert found.image_tokenizer is not None
        expected = model.state_dict()
        assert all(torch.equal(t, expected[name]) for name, t in found.image_tokenizer.state_dict().items())


def test_what_is_wrong_with_a_codebook_is_said() -> None:
    model = DVae(SMALL)
    encoder, decoder = dalle.to_dalle(model), dalle.to_dalle(model, "decoder")
    with pytest.raises(TriviumError, match="DALL-E's decoder where the encoder is needed"):
        dalle.from_dalle(decoder)
    with pytest.raises(TriviumError, match=r"misses 1 tensor \(blocks\.group_2\.block_2\.res_path\.conv_3\.w\)"):
        dalle.from_dalle({name: t for name, t in encoder.items() if name != "blocks.group_2.block_2.res_path.conv_3.w"})
    with pytest.raises(TriviumError, match=r"unexpected tensor \(blocks\.group_1\.norm\.w\)"):
        dalle.from_dalle({**encoder, "blocks.group_1.norm.w": torch.ones(1)})
    with pytest.raises(TriviumError, match=r"blocks\.group_1\.block_1\.res_path\.conv_1\.b .* shape \[3\]"):
        dalle.from_dalle({**encoder, "blocks.group_1.block_1.res_path.conv_1.b": torch.ones(3)})
    with pytest.raises(TriviumError, match="differ in num_codes"):
        dalle.from_dalle(encoder, dalle.to_dalle(DVae(DVaeConfig(width=8, num_codes=9, decoder=True)), "decoder"))
    with pytest.raises(TriviumError, match="3 groups has no place"):
        dalle.to_hf(DVae(DVaeConfig(width=4, num_groups=3, num_codes=9)))
