from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import trivium
from trivium.convert import flava
from trivium.data.tokenizer import BERT_SPECIALS, Tokenizer
from trivium.data.transforms import ImageTransform, normalize
from trivium.errors import TriviumError
from trivium.load import Bundle, load, load_image_tokenizer
from trivium.manifest import verify_manifest, write_manifest, written_beside
from trivium.models.dvae import DVae, DVaeConfig
from trivium.models.flava import FlavaConfig
from trivium.models.patch_codebook import PatchCodebook

WORDS = [*BERT_SPECIALS, "a", "red", "mug", "blue", "cup", "of", "tea"]
CONFIG = FlavaConfig.of_size(
    "tiny", width=32, num_heads=2, mlp_width=48, image_layers=2, text_layers=2, multimodal_layers=1, image_size=32,
    vocab_size=len(WORDS), max_length=12, num_codes=20, projection_width=16,
)  # fmt: skip
TEXTS = ["a red mug", "blue", "a cup of tea of tea"]


def new_bundle() -> Bundle:
    model, _ = flava.build(CONFIG, {})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokenizer = DVae(DVaeConfig(width=8, num_codes=20, decoder=True))
    labels = ["Tasse", "茶", "mug"]
    return Bundle("flava", model, Tokenizer.wordpiece(WORDS), ImageTransform(32), tokenizer, labels, max_length=8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("models") / "shop"
    new_bundle().save(folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for path, side in zip(paths, (20, 32, 51), strict=True):
        Image.fromarray(rng.integers(0, 256, (side, side + 3, 3), dtype=np.uint8)).save(path)
    return paths


def test_five_lines(saved: Path, pictures: list[Path]) -> None:
    bundle = trivium.load(saved)
    image, text = bundle.encode_image(pictures), bundle.encode_text(TEXTS)
    similarity = image.projected @ text.projected.T
    belongs = bundle.match(pictures, TEXTS)
    assert similarity.abs().max() <= 1 + 1e-6
    assert ((0 < belongs) & (belongs < 1)).all()
    # By hand, in training mode's full machinery: the same numbers.
    pixels = normalize(torch.stack([bundle.transform(path.read_bytes()) for path in pictures]))
    ids, mask = bundle.tokenizer.pad(bundle.tokenizer.encode(TEXTS, 8))  # type: ignore[union-attr]
    model = bundle.model
    logits = model.match(model.fuse(model.encode_image(pixels), model.encode_text(ids, mask)))
    assert torch.allclose(belongs, logits.softmax(-1)[:, 1], atol=1e-6)
    for encoded in (image, text, bundle.fuse(image, text)):
        assert not encoded.states.requires_grad
        assert not encoded.tokens.requires_grad
        assert not encoded.pooled.requires_grad
    assert not image.projected.requires_grad


def test_everything_comes_back_from_the_folder(saved: Path) -> None:
    torch.manual_seed(3)
    first, second = new_bundle(), load(saved)
    for name in ("model", "image_tokenizer"):
        a, b = getattr(first, name).state_dict(), getattr(second, name).state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert second.model.config == CONFIG
    assert second.image_tokenizer.config == first.image_tokenizer.config  # type: ignore[union-attr]
    assert (second.labels, second.max_length, second.transform) == (first.labels, 8, first.transform)
    assert second.tokenizer is not None
    assert second.tokenizer.encode(TEXTS, 8) == first.tokenizer.encode(TEXTS, 8)  # type: ignore[union-attr]
    assert not second.model.training


def test_a_bundle_without_the_optional_parts(tmp_path: Path) -> None:
    bundle = new_bundle()
    bundle.tokenizer = bundle.labels = bundle.image_tokenizer = None
    bundle.save(tmp_path / "m")
    again = load(tmp_path / "m")
    assert again.tokenizer is None
    assert again.labels is None
    assert again.image_tokenizer is None
    with pytest.raises(TriviumError, match=r"without a tokenizer: set bundle\.tokenizer"):
        again.encode_text("a mug")
    with pytest.raises(TriviumError, match="holds no image tokenizer"):
        load_image_tokenizer(tmp_path / "m")


def test_a_patch_codebook_in_a_model_folder(tmp_path: Path) -> None:
    bundle = new_bundle()
    bundle.image_tokenizer = PatchCodebook.fit(torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8), 20, 4)
    bundle.save(tmp_path / "m")
    again = load_image_tokenizer(tmp_path / "m")
    pixels = torch.rand(2, 3, 8, 8)
    assert torch.equal(again.encode(pixels), bundle.image_tokenizer.encode(pixels))
    assert again.stride == 4


def test_every_kind_of_picture_gives_the_same(saved: Path, pictures: list[Path]) -> None:
    bundle = load(saved)
    path = pictures[1]
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    array = np.asarray(picture)
    prepared = bundle.transform(array)
    expected = bundle.encode_image(path).projected
    assert expected.shape == (1, 16)
    forms = [str(path), path.read_bytes(), picture, array, [array], (path,), prepared[None]]
    for form in forms:
        assert torch.equal(bundle.encode_image(form).projected, expected)
    assert torch.allclose(bundle.encode_image(prepared[None].float() / 255).projected, expected, atol=1e-5)


def test_a_picture_in_memory_is_read_by_the_rules_of_files(saved: Path, tmp_path: Path) -> None:
    """Transparent, 16 bits a channel, turned by EXIF: opened by Pillow or by path, the same."""
    bundle, generator = load(saved), np.random.default_rng(0)
    clear = Image.fromarray(generator.integers(0, 256, (40, 40, 4), dtype=np.uint8), "RGBA")
    grey = Image.fromarray(generator.integers(0, 65536, (40, 40), dtype=np.uint16))
    turned = Image.fromarray(generator.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, picture in (("clear", clear), ("grey", grey), ("turned", turned)):
        path = tmp_path / f"{name}.png"
        picture.save(path, exif=exif if name == "turned" else Image.Exif())
        with Image.open(path) as opened:
            assert torch.equal(bundle.encode_image(opened).projected, bundle.encode_image(path).projected), name


def test_no_text_is_a_sentence(saved: Path) -> None:
    with pytest.raises(TriviumError, match="no text to encode: the list is empty"):
        load(saved).encode_text([])


def test_long_lists_go_in_pieces_and_come_out_whole(saved: Path, pictures: list[Path]) -> None:
    bundle = load(saved)
    several = pictures * 3
    whole, pieces = bundle.encode_image(several, batch=99), bundle.encode_image(several, batch=2)
    assert torch.allclose(whole.projected, pieces.projected, atol=1e-6)
    assert torch.allclose(whole.tokens, pieces.tokens, atol=1e-5)
    assert [len(part.states) for part in bundle.images(iter(several), batch=4)] == [4, 4, 1]
    texts = TEXTS * 3
    whole, pieces = bundle.encode_text(texts, batch=99), bundle.encode_text(texts, batch=2)
    assert torch.allclose(whole.projected, pieces.projected, atol=1e-6)
    assert torch.equal(whole.mask, pieces.mask)  # type: ignore[arg-type]
    assert whole.states.shape[1] == 8  # cut at max_length


def test_images_reads_a_picture_only_when_its_turn_comes(saved: Path, pictures: list[Path]) -> None:
    parts = load(saved).images([*pictures, Path("absent.png")], batch=3)
    assert len(next(parts).states) == 3
    with pytest.raises(TriviumError, match=r"absent\.png: cannot be read as a picture"):
        next(parts)


def test_one_picture_against_many_texts(saved: Path, pictures: list[Path]) -> None:
    bundle = load(saved)
    each = torch.cat([bundle.match(pictures[0], text) for text in TEXTS])
    assert torch.allclose(bundle.match(pictures[0], TEXTS), each, atol=1e-5)
    assert bundle.match(bundle.encode_image(pictures), "a mug").shape == (3,)
    with pytest.raises(TriviumError, match="3 pictures and 2 texts do not pair up"):
        bundle.match(pictures, TEXTS[:2])


def test_the_mode_of_a_model_in_training_is_left_as_it_was() -> None:
    bundle = new_bundle()
    bundle.model.train()
    for module in bundle.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    assert torch.equal(bundle.encode_text(TEXTS).projected, bundle.encode_text(TEXTS).projected)  # no dropout
    assert bundle.model.training
    assert all(parameter.requires_grad for parameter in bundle.model.parameters())


@pytest.mark.parametrize(
    ("picture", "says"),
    [
        (b"", "cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n truncated", "cannot be decoded"),
        (3, "not int"),
        (np.zeros((4, 4, 3)), "this one float64"),
        (np.zeros((4, 4), np.uint8), r"this one uint8 \[4, 4\]"),
        (torch.zeros(3, 32, 32), r"\[B, 3, H, W\], this one \[3, 32, 32\]"),
        (torch.zeros(1, 3, 32, 36), "32 x 36 pixels cannot be cut into patches of"),
        (torch.full((1, 3, 32, 32), 7.0), r"lie in \[0, 1\]"),
        (torch.full((1, 3, 32, 32), float("nan")), r"lie in \[0, 1\]"),
        ([], "list is empty"),
    ],
)
def test_what_is_no_picture(saved: Path, picture: object, says: str) -> None:
    with pytest.raises(TriviumError, match=says):
        load(saved).encode_image([picture] if isinstance(picture, int) else picture)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["model.safetensors", "image_tokenizer.safetensors", "config.json", "tokenizer.json",
                                  "preprocessor.json", "labels.json", "manifest.json"])  # fmt: skip
@pytest.mark.parametrize("damage", ["cut", "bit", "gone"])
def test_a_damaged_model_folder_names_the_file(saved: Path, tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    path = folder / name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 3] ^= 0x10
        path.write_bytes(data)
    # A changed checksum accuses the file that it belongs to.
    says = "copy" if (name, damage) == ("manifest.json", "bit") else name.replace(".", r"\.")
    with pytest.raises(TriviumError, match=says):
        load(folder)


def test_the_share_of_false_pairs_travels_and_older_folders_go_without(saved: Path, tmp_path: Path) -> None:
    replace(load(saved), false_pairs=0.2).save(tmp_path / "new")
    assert load(tmp_path / "new").false_pairs == 0.2
    path = tmp_path / "new" / "config.json"
    config = json.loads(path.read_text())
    del config["false_pairs"]
    path.write_text(json.dumps(config))
    write_manifest(tmp_path / "new")
    assert load(tmp_path / "new").false_pairs is None


def test_whether_fusion_was_trained_travels_and_where_no_folder_says_it_is_not_known(
    saved: Path, tmp_path: Path
) -> None:
    assert load(saved).fusion_trained is None
    for known in (True, False):
        replace(load(saved), fusion_trained=known).save(tmp_path / f"{known}")
        assert load(tmp_path / f"{known}").fusion_trained is known
        assert load(tmp_path / f"{known}").untrained == (() if known else ("itm_head",)), "nor was what judges it"


def test_a_run_takes_its_newest_sound_checkpoint_and_says_so(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step, max_length in ((100, 5), (200, 6), (300, 7)):
        bundle = load(saved)
        bundle.max_length = max_length
        model = run / "checkpoints" / f"step-{step:08d}" / "model"
        model.mkdir(parents=True)
        bundle.save(model)  # into the empty folder that it is given
    assert load(run).max_length == 7
    assert load(run / "checkpoints" / "step-00000200").max_length == 6
    weights = run / "checkpoints" / "step-00000300" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="step-00000300 is damaged and is passed over"):
        assert load(run).max_length == 6
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "model" / "config.json").unlink()
    with pytest.raises(TriviumError, match="no sound checkpoint"):
        load(run)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"family": "palm"}, "no family 'palm' is known: flava"),
        ({"model": {"depth": 3}}, r"FlavaConfig has no \['depth'\]"),
        ({"model": {**vars(CONFIG), "image_layers": 1}}, r"has unexpected 12 tensors \(image\.encoder\.blocks\.1"),
        ({"model": {**vars(CONFIG), "vocab_size": 13}}, "has other shapes for 5 tensors"),
        ({"image_tokenizer": {"kind": "vq"}}, "no image tokenizer 'vq' is known"),
    ],
)
def test_a_folder_whose_parts_do_not_fit(saved: Path, tmp_path: Path, change: dict, says: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    write_manifest(folder)
    with pytest.raises(TriviumError, match=says):
        load(folder)


def test_saving_never_writes_over_anything(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("precious")
    for target in (saved, tmp_path / "taken", tmp_path / "taken" / "mine"):
        with pytest.raises(TriviumError, match="exists already"):
            load(saved).save(target)
    with pytest.raises(TriviumError, match="could not be written"):
        load(saved).save(tmp_path / "taken" / "mine" / "below a file")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    with pytest.raises(TriviumError, match="does not exist"):
        load(tmp_path / "nowhere")


def test_a_failure_midway_leaves_nothing(tmp_path: Path) -> None:
    def fill_the_disk() -> None:
        with written_beside(tmp_path / "out") as folder:
            (folder / "first").write_text("x")
            raise OSError(28, "No space left on device")

    with pytest.raises(TriviumError, match="could not be written"):
        fill_the_disk()
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_covers_folders_below_and_refuses_nonsense(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("x")
    write_manifest(tmp_path)
    verify_manifest(tmp_path)
    (tmp_path / "a" / "b").write_text("y")
    with pytest.raises(TriviumError, match="b: its bytes changed"):
        verify_manifest(tmp_path)
    for nonsense in ("", "[]", '{"files": 3}', '{"files": {"a": {}}}'):
        (tmp_path / "manifest.json").write_text(nonsense)
        with pytest.raises(TriviumError, match=r"manifest\.json: damaged"):
            verify_manifest(tmp_path)


def test_the_name_load_is_a_function_in_whatever_order_things_are_imported(saved: Path) -> None:
    orders = ["", "import trivium.load", "from trivium.load import Bundle", "from trivium import Bundle"]
    code = f"""
import sys
for order in {orders!r}:
    for name in [name for name in sys.modules if name.split(".")[0] == "trivium"]:
        del sys.modules[name]
    exec(order)
    import trivium
    for _ in range(2):
        print(type(trivium.load({str(saved)!r})) is trivium.Bundle)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["True"] * 8, ran.stderr
