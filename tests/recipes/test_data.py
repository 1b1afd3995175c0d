"""What a recipe makes of its data: cached codes, vocabularies, which streams take part, where text starts."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers, trainers

import trivium
from tests.recipes.shop import LOSSES, checkpoint, data_of, drawing, flags
from tests.recipes.shop import trivium as command
from trivium.cli.overrides import set_overrides, split_overrides
from trivium.data.codes import picture_digest
from trivium.data.tokenizer import Tokenizer
from trivium.errors import TriviumError
from trivium.load import image_tokenizer_hash, load_image_tokenizer, save_image_tokenizer
from trivium.models.dvae import DVae, DVaeConfig
from trivium.models.patch_codebook import PatchCodebook
from trivium.recipes.data import Data, make_tokenizer, open_sources
from trivium.recipes.flava import FlavaRecipe, PreparedFlava, flava
from trivium.train import trainer

CROPS = 2


def recipe_of(*words: object) -> FlavaRecipe:
    return set_overrides(flava("tiny"), split_overrides([str(word) for word in words]))


def prepared_of(*words: object) -> PreparedFlava:
    return recipe_of(*words).prepare("flava", {"size": "tiny"})


@pytest.fixture(scope="module")
def dvae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image tokenizer whose view is 8 x 8 where the model's is 32 x 32."""
    torch.manual_seed(1)
    config = DVaeConfig(width=8, num_groups=2, blocks_per_group=1, num_codes=24, code_width=8)
    folder = tmp_path_factory.mktemp("tokenizer") / "dvae"
    save_image_tokenizer(DVae(config), folder)
    return folder


@pytest.fixture(scope="module")
def words(shop: Path, dvae: Path) -> list[object]:
    """A run with wide crops, so that a code of another crop would show."""
    return [
        *data_of(shop), "--data.validation", shop / "goods.csv", "--data.image-tokenizer", dvae,
        *flags(data__color_jitter=0, data__flip=0.5, train__device="cpu"), "--data.crop-scale", 0.2, 0.9,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def cache(words: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("codes") / "codes.safetensors"
    assert command("data", "codes", "flava", "--out", out, "--crops", CROPS, *words) == 0
    return out


# ------------------------------------------------------------------------------------------------ cached codes


def test_codes_of_a_batch_are_those_of_the_crop_that_the_model_sees(
    shop: Path, dvae: Path, words: list[object], cache: Path
) -> None:
    prepared = prepared_of(*words, "--data.codes", cache)
    _, views, _ = recipe_of(*words).pictures()
    assert (views.size, views.codebook_size) == (32, 8)
    tokenizer = load_image_tokenizer(dvae)
    expected: dict[bytes, list[tuple[int, torch.Tensor]]] = {}
    for file in sorted((shop / "pictures").iterdir()):
        data = file.read_bytes()
        picture_HWC = views.decode(data)
        for number in range(1 + CROPS):
            view = views.numbered(picture_digest(data), number, *picture_HWC.shape[:2])
            codebook_CHW = torch.from_numpy(views.for_codebook(picture_HWC, view))
            codes_N = tokenizer.encode(codebook_CHW[None].float() / 255)[0]
            shown = views.for_model(picture_HWC, view).tobytes()
            expected.setdefault(shown, []).append((number, codes_N))

    def numbers_of(batch: Any) -> set[int]:
        assert len(batch.images) == 1  # the image tokenizer's own view is not made
        numbers = set()
        for pixels_CHW, codes_N in zip(batch.images[0].pixels_BCHW, batch.targets["codes"], strict=True):
            candidates = expected[pixels_CHW.numpy().tobytes()]
            found = [number for number, codes in candidates if torch.equal(codes, codes_N)]
            assert found
            numbers |= set(found)
        return numbers

    batches = [batch for step in prepared.run.mixture.loader(0, 0, 1, 12) for batch in step]
    pictured = [batch for batch in batches if batch.images]
    assert {batch.stream for batch in pictured} == {"pairs", "images"}
    assert set().union(*(numbers_of(batch) for batch in pictured)) == {1, 2}
    for stream in ("pairs", "images"):
        assert set().union(*(numbers_of(batch) for batch in prepared.validation[stream])) == {0}


def test_training_from_a_cache_never_runs_the_image_tokenizer(
    words: list[object], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepared_of(*words, "--data.codes", cache)

    def refuse(self: DVae, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the image tokenizer ran")

    monkeypatch.setattr(DVae, "encode", refuse)
    trainer.train(prepared.run, tmp_path / "run")
    monkeypatch.undo()
    # The checkpoint's own copy of the tokenizer is known again, so the run can go on with the same cache.
    again = recipe_of(*words, "--data.codes", cache)
    again.prepare("flava", {"size": "tiny"}, checkpoint(tmp_path / "run", 6) / "model")


def test_a_cache_serves_the_patch_codebook_that_a_run_learns(shop: Path, tmp_path: Path) -> None:
    words = [*data_of(shop), *flags(train__device="cpu")]
    out = tmp_path / "codes.safetensors"
    assert command("data", "codes", "flava", "--out", out, *words) == 0
    [batch] = next(iter(prepared_of(*words, "--data.codes", out).run.mixture.loader(0, 0, 1, 1)))
    assert batch.targets["codes"].shape == (8, 16)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["--data.flip", "0"], "flip = 0.5, but this run has 0"),
        (["--data.crop-scale", "0.5", "1"], "crop_scale = [0.2, 0.9], but this run has [0.5, 1.0]"),
        (["--model.image-size", "64"], "size = 8, but this run has 16"),
        (["--data.image-tokenizer", "patches"], "tokenizer = "),
    ],
)
def test_a_cache_of_other_settings_is_refused(words: list[object], cache: Path, changes: list[str], named: str) -> None:
    options = split_overrides([str(word) for word in words]) | split_overrides(changes)
    recipe = set_overrides(set_overrides(flava("tiny"), options), {"data.codes": str(cache)})
    with pytest.raises(TriviumError, match=r"build it again") as refusal:
        recipe.prepare("flava", {"size": "tiny"})
    assert str(cache) in str(refusal.value)
    assert named in str(refusal.value)


def test_a_cache_that_is_not_there_is_one_sentence(words: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("pretrain", "flava", *words, "--data.codes", "nowhere.safetensors") == 2
    assert f"trivium: the code cache {Path('nowhere.safetensors').resolve()} cannot be read" in capsys.readouterr().err


def test_the_hash_of_an_image_tokenizer_names_kind_settings_and_weights(dvae: Path) -> None:
    first, second = load_image_tokenizer(dvae), load_image_tokenizer(dvae)
    assert image_tokenizer_hash(first) == image_tokenizer_hash(second)
    with torch.no_grad():
        second.encoder.head.bias[3] += 1e-6
    hashes = {image_tokenizer_hash(each) for each in (first, second, PatchCodebook(16, 4), PatchCodebook(4, 8))}
    assert len(hashes) == 4


def test_codes_made_in_a_step_may_be_bfloat16s_and_what_is_kept_stays_exact(
    dvae: Path, words: list[object], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bf16 = ("--data.image-tokenizer-precision", "bf16")
    prepared = prepared_of(*words, *bf16)
    kept, exact = prepared.bundle.image_tokenizer, load_image_tokenizer(dvae)
    assert kept is not None and image_tokenizer_hash(kept) == image_tokenizer_hash(exact)
    method: Any = prepared.run.method
    assert {parameter.dtype for parameter in method.image_tokenizer.parameters()} == {torch.bfloat16}
    in_bf16 = load_image_tokenizer(dvae)
    assert isinstance(in_bf16, DVae)
    in_bf16.frozen(torch.bfloat16)
    pictured = [batch for step in prepared.run.mixture.loader(0, 0, 1, 4) for batch in step if batch.images]
    assert pictured
    for batch in pictured:
        found = method.codes(batch, torch.arange(len(batch.images[-1].pixels_BCHW)))
        pixels = batch.images[-1].pixels_BCHW.float() / 255
        assert torch.equal(found, in_bf16.encode(pixels))
        assert 0.5 < (found == exact.encode(pixels)).float().mean(), "most are those of float32"

    without = [word for loss in LOSSES if loss != "mlm" for word in (f"--objectives.{loss.replace('_', '-')}", 0)]
    assert prepared_of(*words, *bf16, *without).run.method.image_tokenizer is None, "nothing to refuse in words alone"
    assert command("pretrain", "flava", *words, *bf16, "--data.codes", cache) == 2
    assert "made in the step: --data.codes holds them already" in capsys.readouterr().err
    assert command("pretrain", "flava", *bf16) == 2
    assert "that of a dVAE's codes made in the step: this run has none" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- vocabularies


def test_a_vocabulary_is_learned_without_opening_one_picture(tmp_path: Path) -> None:
    rows = "\n".join(f"lost/{number}.png,zebra crossing" for number in range(40))
    (tmp_path / "a.csv").write_text(f"image,caption\n{rows}\n")
    (tmp_path / "b.jsonl").write_text('{"image": "gone.png", "caption": ["quokka", "quokka smiling"]}\n' * 9)
    data = Data(pairs=(str(tmp_path / "a.csv"), str(tmp_path / "b.jsonl")))
    tokenizer = make_tokenizer(data, open_sources(data), 200)
    for word in ("zebra", "crossing", "quokka", "smiling"):
        assert len(tokenizer.encode([word], 16)[0]) == 3  # with [CLS] and [SEP]


def test_german_and_japanese_captions_through_a_vocabulary_of_ones_own(tmp_path: Path) -> None:
    captions = ["ein grüner Kreis", "drei Äpfel auf weißem Grund", "赤い丸がひとつ", "緑の四角と青い三角"]
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = tokenizers.Tokenizer(models.Unigram())
    vocabulary.pre_tokenizer = pre_tokenizers.Metaspace()
    vocabulary.decoder = tokenizers.decoders.Metaspace()
    vocabulary.train_from_iterator(
        captions, trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    vocabulary.save(str(tmp_path / "tokenizer.json"))
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for number, caption in enumerate(captions * 2):
            drawing("green", "circle").rotate(7 * number).save(tmp_path / f"{number}.png")
            rows.writerow([f"{number}.png", caption])
    data = ["--data.pairs", tmp_path / "a.csv", "--data.vocabulary", tmp_path / "tokenizer.json"]
    assert command("pretrain", "flava", *data, *flags(train__steps=2), "--out", tmp_path / "run") == 0
    bundle = trivium.load(tmp_path / "run")
    assert bundle.tokenizer is not None
    assert bundle.tokenizer.vocab_size == bundle.model.config.vocab_size == vocabulary.get_vocab_size()
    for caption, ids in zip(captions, bundle.tokenizer.encode(captions, 64), strict=True):
        assert bundle.tokenizer.unk_id not in ids
        assert bundle.tokenizer.decode(ids) == caption
    assert bundle.encode_text(captions).projected.shape == (4, 16)


# ------------------------------------------------------------------------------------- streams and their losses


@pytest.mark.parametrize(
    ("weights", "streams"),
    [
        ({}, {"pairs", "images", "text"}),
        ({"mim": 0}, {"pairs", "text"}),
        ({"mlm": 0, "itm": 0}, {"pairs", "images"}),
        ({"mmm_image": 0, "mmm_text": 0, "itm": 0, "contrastive": 0}, {"images", "text"}),
        ({"mim": 0, "mlm": 0, "mmm_image": 0, "mmm_text": 0, "itm": 0}, {"pairs"}),
    ],
)
def test_a_stream_that_feeds_no_loss_takes_no_step(shop: Path, weights: dict[str, int], streams: set[str]) -> None:
    chosen = {f"objectives__{name}": value for name, value in weights.items()}
    prepared = prepared_of(*data_of(shop), "--data.validation", shop / "goods.csv", *flags(**chosen))
    assert {prepared.run.mixture.stream_at(step).name for step in range(12)} == streams
    assert set(prepared.validation) == streams


def test_no_loss_at_all_is_refused(shop: Path) -> None:
    nothing = {f"objectives__{name}": 0 for name in ("mim", "mlm", "mmm_image", "mmm_text", "itm", "contrastive")}
    with pytest.raises(TriviumError, match="every loss has weight 0"):
        prepared_of(*data_of(shop), *flags(**nothing))
    with pytest.raises(TriviumError, match=r"no data feeds a loss .*: give --data.pairs or --data.images, or"):
        prepared_of("--data.text", shop / "lines.txt", *flags(objectives__mlm=0))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model__image_size": 65}, "a picture of 65 pixels cannot be cut into patches of 8: choose a multiple"),
        ({"model__num_heads": 5}, "a width of 32 cannot be shared by 5 heads"),
        ({"data__max_length": 80}, "texts of 80 tokens do not fit a model of 64 positions: lower --data.max-length"),
        ({"data__text_length": 80}, "texts of 80 tokens do not fit a model of 64 positions: lower --data.text-length"),
    ],
)
def test_shapes_that_do_not_go_together(
    shop: Path, changes: dict[str, object], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("pretrain", "flava", *data_of(shop), *flags(**changes)) == 2
    assert f"trivium: {sentence}" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- text from a BERT

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "red", "circle", "##s"]


def save_bert(folder: Path, kind: type = transformers.BertForMaskedLM, width: int = 32, **changes: int) -> Path:
    config = transformers.BertConfig(
        vocab_size=len(PIECES), hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        **{"max_position_embeddings": 70, **changes},
    )  # fmt: skip
    torch.manual_seed(5)
    kind(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    return folder


@pytest.mark.parametrize("kind", [transformers.BertModel, transformers.BertForMaskedLM])
def test_the_text_side_starts_as_a_bert(shop: Path, tmp_path: Path, kind: type) -> None:
    folder = save_bert(tmp_path / "bert", kind)
    bert = kind.from_pretrained(folder)
    embeddings = (bert if kind is transformers.BertModel else bert.bert).embeddings
    prepared = prepared_of(*data_of(shop), *flags(), "--init-text", folder)
    plain = prepared_of(*data_of(shop), *flags(), "--data.vocabulary", tokenizer_json(tmp_path))
    model, other = prepared.bundle.model, plain.bundle.model
    assert torch.equal(model.text.embeddings.word.weight, embeddings.word_embeddings.weight)
    assert torch.equal(model.text.embeddings.position.weight, embeddings.position_embeddings.weight[:64])
    assert torch.equal(model.text.embeddings.norm.bias, embeddings.LayerNorm.bias)
    has_head = kind is transformers.BertForMaskedLM
    for head in ("mlm_head", "mmm_text_head"):
        same = torch.equal(getattr(model, head).transform.weight, getattr(other, head).transform.weight)
        assert same == (not has_head)  # without a head in the file, what the run's own seed draws
    if has_head:
        assert torch.equal(model.mlm_head.transform.weight, bert.cls.predictions.transform.dense.weight)
    assert torch.equal(model.image.positions, other.image.positions)
    assert prepared.bundle.tokenizer is not None
    assert prepared.bundle.tokenizer.encode(["red circles"], 16) == [[2, 31, 32, 33, 3]]
    [sentence] = prepared.notes
    assert f"embeddings of {len(PIECES)} words and 64 positions" in sentence
    assert ("head of masked words" in sentence) == has_head
    assert "left out are " in sentence
    assert plain.notes == []


def test_a_wider_bert_gives_its_embeddings_along_the_axes_of_its_words(shop: Path, tmp_path: Path) -> None:
    folder = save_bert(tmp_path / "bert", transformers.BertForMaskedLM, width=48)
    words = load_file(folder / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    prepared = prepared_of(*data_of(shop), *flags(), "--init-text", folder)
    plain = prepared_of(*data_of(shop), *flags(), "--data.vocabulary", tokenizer_json(tmp_path))
    own, other = prepared.bundle.model, plain.bundle.model
    # 34 words differ in 33 directions at most, of which the model has room for the 32 largest.
    kept, whole = (torch.cdist(each.double(), each.double()) for each in (own.text.embeddings.word.weight, words))
    assert (kept <= whole + 1e-5).all() and kept.square().sum() > 0.98 * whole.square().sum()
    assert torch.equal(own.text.embeddings.norm.weight, other.text.embeddings.norm.weight)
    assert torch.equal(own.mlm_head.transform.weight, other.mlm_head.transform.weight)
    [sentence] = prepared.notes
    assert "64 positions, 32 of their 48 channels by the words' principal axes; left out are" in sentence


def tokenizer_json(folder: Path) -> Path:
    Tokenizer.wordpiece(PIECES).save(folder / "tokenizer.json")
    return folder / "tokenizer.json"


def test_a_run_from_a_bert_says_so_and_can_go_on(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = save_bert(tmp_path / "bert"), tmp_path / "run"
    run = ["pretrain", "flava", *data_of(shop), *flags(train__steps=2, train__save_every=1)]
    run += ["--init-text", folder, "--out", out]
    assert command(*run) == 0
    assert capsys.readouterr().err.count(f"{folder}: taken are the embeddings of") == 1
    (folder / "model.safetensors").unlink()  # a run that goes on needs its checkpoint alone
    shutil.rmtree(checkpoint(out, 2))
    assert command("pretrain", "flava", "--resume", "--out", out) == 0
    assert checkpoint(out, 2).is_dir()


@pytest.mark.parametrize(
    ("bert", "run", "sentence"),
    [
        ({"width": 16}, [], "has width 16, the model 32: set --model.width 16, or choose a BERT of width 32 or more"),
        ({"width": 30}, ["--model.num-heads", "4"], "set --model.width 30 --model.num-heads 2, or"),
        ({}, ["--data.vocabulary", "bert"], "has 34 words, the vocabulary of this run 30,522"),
        ({"max_position_embeddings": 40}, [], "has 40 positions, the model 64: set --model.max-length 40"),
        ({}, ["--init", "x"], "give one of them"),
    ],
)
def test_a_bert_that_does_not_fit(
    shop: Path, tmp_path: Path, bert: dict[str, Any], run: list[str], sentence: str
) -> None:
    folder = save_bert(tmp_path / "bert", **bert)
    words = [str(word) for word in [*data_of(shop), *flags(), "--init-text", folder]]
    recipe = set_overrides(flava("tiny"), split_overrides(words) | split_overrides(run))
    with pytest.raises(TriviumError) as refusal:
        recipe.prepare("flava", {"size": "tiny"})
    assert sentence in str(refusal.value)


@pytest.mark.parametrize("kind", [transformers.BertModel, transformers.BertForMaskedLM])
def test_a_bert_of_every_layout_gives_the_same(shop: Path, tmp_path: Path, kind: type) -> None:
    """Hugging Face's, one saved from within sentence-transformers, and a model folder of ours."""
    theirs = save_bert(tmp_path / "theirs", kind)
    inside = Path(shutil.copytree(theirs, tmp_path / "inside"))
    state = {f"0.auto_model.{name}": tensor for name, tensor in load_file(theirs / "model.safetensors").items()}
    save_file(state, inside / "model.safetensors")
    assert command("convert", theirs, "--to", "trivium", "--out", tmp_path / "ours") == 0
    folders = [theirs, tmp_path / "ours", *([inside] if kind is transformers.BertModel else [])]
    first, *others = [prepared_of(*data_of(shop), *flags(), "--init-text", folder) for folder in folders]
    for other in others:
        assert other.bundle.tokenizer.encode(["red circles"], 16) == first.bundle.tokenizer.encode(["red circles"], 16)
        expected = first.bundle.model.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in other.bundle.model.state_dict().items())
        assert [note.partition(": ")[2] for note in other.notes] == [note.partition(": ")[2] for note in first.notes]


@pytest.mark.parametrize(
    ("kind", "settings", "family"),
    [
        (transformers.RobertaModel, transformers.RobertaConfig, "roberta"),
        (transformers.ElectraModel, transformers.ElectraConfig, "electra"),
    ],
)
def test_a_relative_of_bert_is_refused_by_name(
    shop: Path, tmp_path: Path, kind: type, settings: type, family: str
) -> None:
    """Under the very names of a BERT, and with other positions (RoBERTa's begin at 2) or another head."""
    config = settings(
        vocab_size=len(PIECES), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=70, embedding_size=32,
    )  # fmt: skip
    kind(config).save_pretrained(tmp_path)
    assert "embeddings.word_embeddings.weight" in load_file(tmp_path / "model.safetensors")
    words = [*data_of(shop), *flags(), "--data.vocabulary", tokenizer_json(tmp_path), "--init-text", tmp_path]
    with pytest.raises(TriviumError, match=f'model_type "{family}" where "bert" is needed'):
        prepared_of(*words)
    (tmp_path / "config.json").unlink()  # then nothing tells it from a BERT
    with pytest.raises(TriviumError, match=r"needs the config\.json of the model beside its weights"):
        prepared_of(*words)


def test_what_is_no_bert_or_came_without_words(shop: Path, tmp_path: Path, dvae: Path) -> None:
    words = [*data_of(shop), *flags()]
    with pytest.raises(TriviumError, match="are in none of the layouts"):
        prepared_of(*words, "--init-text", dvae / "image_tokenizer.safetensors")
    folder = save_bert(tmp_path / "bert")
    (folder / "vocab.txt").unlink()
    with pytest.raises(TriviumError, match=r"--data.vocabulary bert for the uncased English one"):
        prepared_of(*words, "--init-text", folder)
    with pytest.raises(TriviumError, match="nowhere does not exist"):
        prepared_of(*words, "--init-text", tmp_path / "nowhere")


def test_pairs_held_out_of_no_data_are_refused(shop: Path) -> None:
    with pytest.raises(TriviumError, match=r"--data\.validation holds pairs out of data of your own"):
        open_sources(Data(validation=(str(shop / "goods.csv"),)))
