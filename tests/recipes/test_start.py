"""What a run may start from: the families that fit are taken, number by number, and any other is named."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.convert.test_beit import of_its_authors, peer, saved
from tests.recipes.shop import data_of, flags, trivium
from trivium.bundle import Bundle
from trivium.convert import vit
from trivium.data.transforms import ImageTransform
from trivium.errors import TriviumError
from trivium.load import load
from trivium.models.bert import Bert, BertConfig
from trivium.models.clip import Clip, ClipConfig
from trivium.models.dino import Dino, DinoConfig
from trivium.models.flava import Flava, FlavaConfig
from trivium.models.vit import ViT, ViTConfig
from trivium.recipes import RECIPES
from trivium.train.config import set_leaves

IMAGE = {"image_size": 32, "patch_size": 8}
TOWER = {"width": 64, "num_heads": 1, "mlp_width": 64, "num_layers": 1}
MODELS: dict[str, nn.Module] = {
    "flava": Flava(FlavaConfig.of_size("tiny", **IMAGE, num_codes=16, vocab_size=64)),
    "clip": Clip(ClipConfig.of_size("tiny", **IMAGE, vocab_size=64)),
    "dino": Dino(DinoConfig(**TOWER, **IMAGE, head_width=16, bottleneck_width=8, num_prototypes=16)),
    "vit": ViT(ViTConfig(**TOWER, **IMAGE)),
    "bert": Bert(BertConfig(**TOWER, vocab_size=64, max_length=64)),
}
STARTS = {  # recipe and flag -> the families that it takes
    ("flava", "init"): {"flava"},
    ("clip", "init"): {"clip"},
    ("albef", "init"): {"albef"},
    ("dino", "init"): {"dino", "vit"},
    ("dvae", "init"): {"image_tokenizer"},
    ("flava", "init_text"): {"flava", "bert"},
    ("mlm", "init_text"): {"flava", "bert"},
    ("albef", "init_text"): {"bert"},
    ("flava", "init_image"): {"flava", "dino", "vit"},
    ("mim", "init_image"): {"flava", "dino", "vit"},
    ("albef", "init_image"): {"dino", "vit"},
}
REFUSED = [(*start, family) for start, taken in STARTS.items() for family in MODELS if family not in taken]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of each family."""
    out = tmp_path_factory.mktemp("families")
    for family, model in MODELS.items():
        Bundle(family, model.eval(), None, ImageTransform(32)).save(out / f"model of {family}")
    return out


@pytest.mark.parametrize(("recipe", "flag", "family"), REFUSED)
def test_a_start_of_another_family_is_named(recipe: str, flag: str, family: str, folders: Path, shop: Path) -> None:
    path, data = folders / f"model of {family}", {"data.images": [str(shop / "pictures")]}
    if recipe not in ("dino", "dvae"):
        data = {"data.pairs": [str(shop / "goods.csv")]}
    tree = set_leaves(RECIPES[recipe]("tiny"), data | {flag: str(path)})
    with pytest.raises(TriviumError) as refusal:
        tree.prepare(recipe, {"size": "tiny"})
    said = str(refusal.value)
    assert said.startswith(f"{path} holds ")
    assert family in said.removeprefix(str(path)).split(":")[0 if recipe != "dvae" else 1]
    assert type(MODELS[family]).__name__ not in said.split()  # what it is, in words of the user's


@pytest.mark.parametrize("layout", ["dino", "beit"])
def test_the_image_encoder_starts_from_a_file_of_others(
    layout: str, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As their authors' training wrote it: the features are the file's, to the last digit."""
    path, run = tmp_path / f"{layout}.pth", tmp_path / "run"
    torch.manual_seed(7)
    if layout == "dino":
        model = Dino(DinoConfig(**TOWER, **IMAGE, head_width=16, bottleneck_width=8, num_prototypes=16))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.05)
        teacher = vit.to_dino(model)
        student = {f"module.{name}": tensor + 1 for name, tensor in teacher.items()}
        args = argparse.Namespace(arch="vit_tiny", patch_size=8)
        torch.save({"student": student, "teacher": teacher, "args": args, "epoch": 9}, path)
    else:
        beit = peer(hidden_size=64, num_attention_heads=1, intermediate_size=64, num_hidden_layers=1).float()
        torch.save({"model": of_its_authors(saved(beit, tmp_path / "beit")[0])}, path)
    shape = flags(model__width=64, model__num_heads=1, model__eps=1e-6, train__steps=1, optim__lr=0.0)
    capsys.readouterr()
    assert trivium("pretrain", "flava", "--out", run, *data_of(shop), *shape, "--init-image", path) == 0
    said = capsys.readouterr().err
    assert f"{path}: taken is the image encoder of 1 blocks" in said
    assert ("it has no token for hidden patches" in said) == (layout == "dino")
    start, joint = load(path), load(run)
    tower = start.model.backbone if isinstance(start.model, Dino) else start.model
    assert isinstance(tower, ViT) and isinstance(joint.model, Flava)
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(joint.model.encode_image(pixels).tokens, tower.encode_image(pixels).tokens)
    assert (joint.transform.mean, joint.transform.std) == (start.transform.mean, start.transform.std)
