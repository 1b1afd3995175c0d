"""ALBEF's official files: every layout with random numbers in and out bit for bit, and the traps of its texts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import trivium
from tests.recipes.shop import trivium as run
from trivium.convert import albef, read_foreign
from trivium.data.embedded import bert_vocabulary
from trivium.data.tokenizer import BERT_SPECIALS
from trivium.errors import TriviumError
from trivium.invariance.albef import random_albef
from trivium.models.albef import Albef, AlbefConfig
from trivium.models.finetuned import HeadConfig
from trivium.models.grounding import word_heat

WIDTH, MLP, VOCABULARY, POSITIONS, JOINT, QUEUE, PATCH, GRID = 128, 96, 40, 12, 16, 6, 4, 3
IMAGE_LAYERS, TEXT_LAYERS, FUSION_LAYERS = 2, 2, 2


def pair(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


def visual(prefix: str) -> dict[str, tuple[int, ...]]:
    shapes = {f"{prefix}cls_token": (1, 1, WIDTH), f"{prefix}pos_embed": (1, GRID**2 + 1, WIDTH),
              f"{prefix}patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
              f"{prefix}patch_embed.proj.bias": (WIDTH,)}  # fmt: skip
    for n in range(IMAGE_LAYERS):
        block = f"{prefix}blocks.{n}."
        shapes |= norm(f"{block}norm1") | norm(f"{block}norm2")
        shapes |= pair(f"{block}attn.qkv", 3 * WIDTH, WIDTH) | pair(f"{block}attn.proj", WIDTH, WIDTH)
        shapes |= pair(f"{block}mlp.fc1", MLP, WIDTH) | pair(f"{block}mlp.fc2", WIDTH, MLP)
    return shapes | norm(f"{prefix}norm")


def written(prefix: str, layers: int, fusing_from: int) -> dict[str, tuple[int, ...]]:
    """A BERT as xbert.py names it; layers from `fusing_from` on have cross-attention."""
    embeddings = f"{prefix}embeddings."
    shapes = {f"{embeddings}position_ids": (1, POSITIONS), f"{embeddings}word_embeddings.weight": (VOCABULARY, WIDTH),
              f"{embeddings}position_embeddings.weight": (POSITIONS, WIDTH),
              f"{embeddings}token_type_embeddings.weight": (2, WIDTH)} | norm(f"{embeddings}LayerNorm")  # fmt: skip
    for n in range(layers):
        layer = f"{prefix}encoder.layer.{n}."
        for attention in ("attention", "crossattention") if n >= fusing_from else ("attention",):
            for part in ("query", "key", "value"):
                shapes |= pair(f"{layer}{attention}.self.{part}", WIDTH, WIDTH)
            shapes |= pair(f"{layer}{attention}.output.dense", WIDTH, WIDTH)
            shapes |= norm(f"{layer}{attention}.output.LayerNorm")
        shapes |= pair(f"{layer}intermediate.dense", MLP, WIDTH) | pair(f"{layer}output.dense", WIDTH, MLP)
        shapes |= norm(f"{layer}output.LayerNorm")
    return shapes


def head_of_words(prefix: str) -> dict[str, tuple[int, ...]]:
    shapes = pair(f"{prefix}transform.dense", WIDTH, WIDTH) | norm(f"{prefix}transform.LayerNorm")
    return shapes | {f"{prefix}bias": (VOCABULARY,), f"{prefix}decoder.weight": (VOCABULARY, WIDTH),
                     f"{prefix}decoder.bias": (VOCABULARY,)}  # fmt: skip


def official(kind: str) -> dict[str, Tensor]:
    """The names of a released file, written out from the description; every number another, tied ones equal."""
    shapes: dict[str, tuple[int, ...]] = {}
    layers = TEXT_LAYERS + FUSION_LAYERS
    for suffix in ("",) if kind in ("refcoco", "assignment") else ("", "_m"):
        shapes |= visual(f"visual_encoder{suffix}.")
        under = "bert." if kind == "pretrained" else ""
        more = FUSION_LAYERS if kind in ("nlvr", "assignment") else 0
        shapes |= written(f"text_encoder{suffix}.{under}", layers + more, TEXT_LAYERS)
        if kind == "pretrained":
            shapes |= head_of_words(f"text_encoder{suffix}.cls.predictions.")
        if kind in ("pretrained", "retrieval", "refcoco"):
            shapes |= pair(f"vision_proj{suffix}", JOINT, WIDTH) | pair(f"text_proj{suffix}", JOINT, WIDTH)
        if kind == "assignment":
            shapes |= pair("vision_proj", JOINT, WIDTH) | pair("text_proj", JOINT, WIDTH)
            shapes |= pair("ta_head", 3, WIDTH) | {"temp": ()}
        if kind in ("ve", "nlvr"):
            classes = 3 if kind == "ve" else 2
            shapes |= pair(f"cls_head{suffix}.0", WIDTH, WIDTH) | pair(f"cls_head{suffix}.2", classes, WIDTH)
        if kind == "vqa":
            shapes |= written(f"text_decoder{suffix}.bert.", FUSION_LAYERS, 0)
            shapes |= head_of_words(f"text_decoder{suffix}.cls.predictions.")
    if kind in ("pretrained", "retrieval", "refcoco"):
        shapes |= {"temp": ()} | pair("itm_head", 2, WIDTH)
    if kind in ("pretrained", "retrieval"):
        shapes |= {"image_queue": (JOINT, QUEUE), "text_queue": (JOINT, QUEUE), "queue_ptr": (1,)}
    if kind == "retrieval":
        shapes |= {"idx_queue": (1, QUEUE)}
    state = {name: 0.05 * torch.randn(shape) for name, shape in shapes.items()}
    for name in state:
        if name.endswith("position_ids"):
            state[name] = torch.arange(POSITIONS)[None]
        if name in ("queue_ptr", "idx_queue"):
            state[name] = torch.randint(0, 9, shapes[name])
        if name.endswith("cls.predictions.decoder.weight"):
            state[name] = state[name.replace("cls.predictions.decoder", "bert.embeddings.word_embeddings")].clone()
        if name.endswith("cls.predictions.decoder.bias"):
            state[name] = state[name.replace("decoder.bias", "bias")].clone()
    if kind in ("nlvr", "assignment"):
        for name in state:
            for number in range(TEXT_LAYERS, layers + FUSION_LAYERS, 2):
                for part in ("key", "value"):
                    if f"layer.{number}.crossattention.self.{part}." in name:
                        state[name.replace(f"layer.{number}.", f"layer.{number + 1}.")].copy_(state[name])
    return state


KINDS = ("pretrained", "retrieval", "refcoco", "ve", "vqa", "nlvr", "assignment")


@pytest.mark.parametrize("kind", KINDS)
def test_every_official_file_comes_back_bit_for_bit(kind: str) -> None:
    theirs = official(kind)
    config, ours, layout = albef.from_official(theirs, {})
    assert (config.num_heads, config.image_size) == (2, GRID * PATCH)
    assert (config.text_layers, config.fusion_layers) == (TEXT_LAYERS, FUSION_LAYERS)
    assert layout.two_pictures == (kind in ("nlvr", "assignment"))
    back = albef.to_official(ours, config, layout)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    assert sum(t.numel() for t in ours.values()) == sum(
        t.numel()
        for name, t in theirs.items()
        if not name.endswith(("position_ids", "decoder.weight", "predictions.decoder.bias"))
        and not (layout.two_pictures and any(f"layer.{n}.crossattention.self.{part}" in name
                                             for n in (3, 5) for part in ("key", "value")))
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "drawn", "beside"),
    [
        ("pretrained", None, "image_queue, queue_pointer, teacher, text_queue"),
        ("retrieval", "mlm_head", "image_queue, queue_pictures, queue_pointer, teacher, text_queue"),
        ("refcoco", "mlm_head", None),
    ],
)
def test_a_file_is_a_model_and_says_what_it_lacks(
    kind: str, drawn: str | None, beside: str | None, tmp_path: Path
) -> None:
    theirs = official(kind)
    path = tmp_path / "ALBEF.pth"
    whole: Any = theirs if kind == "refcoco" else {"model": theirs, "epoch": 29, "lr_scheduler": {"step": 1}}
    torch.save(whole, path)
    found = read_foreign(path)
    assert found.family == "albef" and isinstance(found.model, Albef)
    assert torch.equal(found.model.temperature, theirs["temp"][None])
    said = " ".join(found.said)
    assert (drawn is not None) == ("drawn at random" in said) and (drawn or "") in said
    assert (beside is not None) == ("left out" in said) and (beside or "") in said


def test_what_the_model_writes_is_a_pretrained_file() -> None:
    model = random_albef(dtype=torch.float32)
    state = albef.state_as(albef.PRETRAINED, model)
    assert torch.equal(state["visual_encoder_m.pos_embed"], state["visual_encoder.pos_embed"])
    assert state["temp"].shape == ()
    config, ours, layout = albef.from_official(state, {"num_attention_heads": model.config.num_heads})
    assert layout == albef.PRETRAINED
    assert config == replace(model.config, dropout=AlbefConfig.dropout)
    assert all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())


def test_texts_are_read_as_in_training(tmp_path: Path) -> None:
    """No [SEP] stands at the end, marks are dropped, and segment 0 is added to every token."""
    model = random_albef(AlbefConfig.of_size("tiny", vocab_size=30522), dtype=torch.float32)
    torch.save({"model": albef.state_as(albef.PRETRAINED, model)}, tmp_path / "ALBEF.pth")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": model.config.num_heads}))
    (tmp_path / "vocab.txt").write_text("\n".join(bert_vocabulary()) + "\n")
    with pytest.warns(UserWarning, match="left out"):
        bundle = trivium.load(tmp_path / "ALBEF.pth")  # type: ignore[operator]
    assert bundle.tokenizer is not None
    assert bundle.tokenizer.encode(["Two dogs."], 25) == [[101, 2048, 6077]]
    assert bundle.tokenizer.encode(["yes[SEP]"], 25) == [[101, 2748, 102]]
    assert (
        bundle.tokenizer.encode(["a red-brown <person>'s cat/dog"], 25)[0]
        == (bundle.tokenizer.encode(["a red brown persons cat dog"], 25)[0])
    )
    assert len(bundle.tokenizer.encode(["dog " * 40], 25)[0]) == 25
    before = bundle.encode_text("two dogs").tokens
    with torch.no_grad():
        bundle.model.text.embeddings.segment.weight[0] += torch.linspace(-1, 1, 128)
    assert not torch.allclose(bundle.encode_text("two dogs").tokens, before, atol=1e-3)
    bundle.save(tmp_path / "model")
    again = trivium.load(tmp_path / "model")  # type: ignore[operator]
    assert again.tokenizer.encode(["Two dogs."], 25) == [[101, 2048, 6077]]
    assert torch.equal(again.encode_text("two dogs").tokens, bundle.encode_text("two dogs").tokens)


def test_a_file_that_does_not_fit_is_one_sentence() -> None:
    theirs = official("pretrained")
    name = "text_encoder.bert.encoder.layer.2.crossattention.self.key.weight"
    with pytest.raises(TriviumError, match=f"misses 1 tensor .{name}"):
        albef.from_official({n: t for n, t in theirs.items() if n != name}, {})
    with pytest.raises(TriviumError, match=r"has unexpected 1 tensor .text_encoder.pooler"):
        albef.from_official(theirs | {"text_encoder.pooler.weight": torch.ones(1)}, {})
    untied = dict(theirs) | {"text_encoder.cls.predictions.decoder.weight": torch.ones(VOCABULARY, WIDTH)}
    with pytest.raises(TriviumError, match="are one tensor in ALBEF, but differ"):
        albef.from_official(untied, {})
    lavis = {n: t for n, t in theirs.items() if "token_type" not in n}
    with pytest.raises(TriviumError, match="trained in LAVIS"):
        albef.from_official(lavis, {})
    with pytest.raises(TriviumError, match="misses 5 tensors"):
        albef.from_official({"visual_encoder.blocks.0.x": torch.ones(1), "a.token_type_embeddings": torch.ones(1),
                             "embeddings.token_type_embeddings.weight": torch.ones(1)}, {})  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "task", "labels"),
    [
        ("ve", "visual_entailment", ["contradiction", "neutral", "entailment"]),
        ("vqa", "vqa", ["a", "b"]),
        ("nlvr", "nlvr2", ["False", "True"]),
        ("assignment", "text_assignment", ["first", "second", "neither"]),
    ],
)
def test_fine_tuned_files_are_opened_with_their_heads_and_written_again(
    kind: str, task: str, labels: list[str], tmp_path: Path
) -> None:
    theirs = official(kind)
    torch.save({"model": theirs}, tmp_path / f"{kind}.pth")
    if kind == "vqa":
        (tmp_path / "answer_list.json").write_text(json.dumps(labels))
    with pytest.warns(UserWarning, match="drawn at random"):
        bundle = trivium.load(tmp_path / f"{kind}.pth")  # type: ignore[operator]
    assert bundle.head is not None and bundle.head_config is not None
    assert (bundle.head_config.task, bundle.labels) == (task, labels)
    assert bundle.model.config.fusion_layers == FUSION_LAYERS
    bundle.save(tmp_path / "model")
    again = trivium.load(tmp_path / "model")  # type: ignore[operator]
    assert again.head_config == bundle.head_config
    layout = albef.layout_for(bundle.head_config)
    assert layout is not None

    def written() -> dict[str, Tensor]:
        head = albef.in_official_order(again.head.state_dict(), again.labels, layout)
        return albef.state_as(layout, again.model, head)

    back = written()
    assert back.keys() == theirs.keys()
    copied = {name for name in theirs if "_m." in name}  # ours writes the student there, the file had a teacher
    for name in theirs.keys() - copied:
        # The heads that the file lacks are drawn, and no part of it.
        assert torch.equal(back[name], theirs[name]), name
    assert all(torch.equal(back[name], back[name.replace("_m.", ".", 1)]) for name in copied)
    turned = list(reversed(labels))
    if kind != "vqa":
        again.labels = turned
        for part in ("weight", "bias"):
            tensor = again.head.get_parameter(f"decoder.{part}")
            tensor.data = tensor.data.flip(0)
        other = written()
        assert all(torch.equal(other[name], back[name]) for name in back)


def test_other_heads_have_no_place_in_an_official_file() -> None:
    own = HeadConfig("mine", "fused", "class", 32, 3, 32, "relu")
    assert albef.layout_for(own) == albef.ENTAILMENT
    for changes in ({"activation": "gelu"}, {"gives": "answers"}, {"hidden": 16}, {"reads": "concatenated"}):
        assert albef.layout_for(replace(own, **changes)) is None


@pytest.mark.parametrize("kind", ["vqa", "nlvr"])
def test_a_converted_model_answers_as_the_file_does(kind: str, tmp_path: Path) -> None:
    torch.save({"model": official(kind)}, tmp_path / "file.pth")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
                                                  + [f"w{n}" for n in range(35)]) + "\n")  # fmt: skip
    (tmp_path / "answer_list.json").write_text('["w1", "w2 w3"]')
    assert run("convert", tmp_path / "file.pth", "--to", "albef", "--out", tmp_path / "again") == 0
    (tmp_path / "again" / "vocab.txt").write_bytes((tmp_path / "vocab.txt").read_bytes())
    (tmp_path / "again" / "answer_list.json").write_bytes((tmp_path / "answer_list.json").read_bytes())
    pixels = torch.randint(0, 256, (2, 3, GRID * PATCH, GRID * PATCH), dtype=torch.uint8)
    second = {"second_pictures": pixels.flip(0)} if kind == "nlvr" else {}
    with pytest.warns(UserWarning, match="drawn at random"):
        bundles = [trivium.load(path) for path in (tmp_path / "file.pth", tmp_path / "again")]  # type: ignore[operator]
    found = [bundle.answer(pixels, ["w5 w6", "w7"], **second) for bundle in bundles]
    shares = {name: value / 255 for name, value in second.items()}
    as_floats = bundles[1].answer(pixels / 255, ["w5 w6", "w7"], **shares)
    torch.testing.assert_close(as_floats, found[1])  # the same pixels
    with pytest.raises(TriviumError, match=r"float pixels must lie in \[0, 1\]"):
        bundles[1].answer(pixels.float(), ["w5 w6", "w7"], **second)
    assert torch.equal(found[0], found[1])
    assert torch.allclose(found[0].sum(1), torch.ones(2))


def test_a_file_for_entailment_answers_with_its_own_labels_and_comes_back(tmp_path: Path) -> None:
    theirs = official("ve")
    torch.save({"model": theirs}, tmp_path / "ve.pth")
    (tmp_path / "vocab.txt").write_text("\n".join([*BERT_SPECIALS, "a", "dog"]) + "\n")
    with pytest.warns(UserWarning, match="drawn at random"):
        bundle = trivium.load(tmp_path / "ve.pth")  # type: ignore[operator]
    assert bundle.labels == ["contradiction", "neutral", "entailment"]
    picture = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    shares = bundle.answer([picture], ["a dog"])
    with torch.no_grad():  # Linear, ReLU, Linear on the raw class token, as published
        fused = bundle.fuse(bundle.encode_image([picture]), bundle.encode_text(["a dog"])).tokens[:, 0]
        inner = (fused @ theirs["cls_head.0.weight"].T + theirs["cls_head.0.bias"]).relu()
        expected = (inner @ theirs["cls_head.2.weight"].T + theirs["cls_head.2.bias"]).softmax(1)
    torch.testing.assert_close(shares, expected)
    assert run("convert", tmp_path / "ve.pth", "--to", "albef", "--out", tmp_path / "back") == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    students = {name: tensor for name, tensor in theirs.items() if "_m." not in name}
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in students.items())
    assert all(torch.equal(back[name.replace(".", "_m.", 1)], tensor) for name, tensor in students.items())


def test_labels_in_another_order_are_written_in_the_official_one(tmp_path: Path) -> None:
    """The names travel with the weights: what entails goes out as number 2, whatever it was here."""
    torch.save({"model": official("ve")}, tmp_path / "ve.pth")
    (tmp_path / "vocab.txt").write_text("\n".join([*BERT_SPECIALS, "a", "dog"]) + "\n")
    with pytest.warns(UserWarning, match="drawn at random"):
        bundle = trivium.load(tmp_path / "ve.pth")  # type: ignore[operator]
    order = [2, 1, 0]
    with torch.no_grad():
        for part in ("weight", "bias"):
            tensor = bundle.head.get_parameter(f"decoder.{part}")
            tensor.copy_(tensor[order].clone())
    bundle.labels = [bundle.labels[n] for n in order]
    bundle.save(tmp_path / "model")
    assert run("convert", tmp_path / "model", "--to", "albef", "--out", tmp_path / "back") == 0
    back, theirs = load_file(tmp_path / "back" / "model.safetensors"), official_weights(tmp_path / "ve.pth")
    assert torch.equal(back["cls_head.2.weight"], theirs["cls_head.2.weight"])
    bundle.labels = ["yes", "no", "maybe"]
    bundle.save(tmp_path / "other")
    assert run("convert", tmp_path / "other", "--to", "albef", "--out", tmp_path / "none") == 2
    assert not (tmp_path / "none").exists()


def official_weights(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(path, weights_only=True)["model"]
    return found


def test_a_model_for_grounding_is_written_as_refcoco_is_and_looks_the_same(tmp_path: Path) -> None:
    """Flat, without momentum copy and queues; every part that grounding needs comes back bit for bit."""
    theirs = official("refcoco")
    torch.save(theirs, tmp_path / "refcoco.pth")
    assert run("convert", tmp_path / "refcoco.pth", "--to", "albef-grounding", "--out", tmp_path / "back") == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in back)
    models = [read_foreign(path).model.double().eval() for path in (tmp_path / "refcoco.pth", tmp_path / "back")]  # type: ignore[union-attr]
    pixels = torch.randn(2, 3, GRID * PATCH, GRID * PATCH, dtype=torch.float64)
    ids = torch.tensor([[1, 7, 9], [1, 8, 5]])
    first, second = (word_heat(m, m.encode_image(pixels), m.encode_text(ids)) for m in models)  # type: ignore[operator, arg-type]
    assert first.shape == (2, 3, GRID**2) and torch.equal(first, second)


def test_a_model_for_retrieval_is_written_as_mscoco_is(tmp_path: Path) -> None:
    theirs = official("retrieval")
    torch.save({"model": theirs}, tmp_path / "mscoco.pth")
    assert run("convert", tmp_path / "mscoco.pth", "--to", "albef-retrieval", "--out", tmp_path / "back") == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    queues = {"image_queue", "text_queue", "queue_ptr", "idx_queue"}
    assert back.keys() == theirs.keys() - queues
    assert all(torch.equal(back[name], theirs[name]) for name in back if "_m." not in name)
    again = read_foreign(tmp_path / "back")
    assert again.head is None and torch.equal(again.model.temperature, theirs["temp"][None])


@pytest.mark.parametrize(
    ("kind", "layout", "lacking"),
    [
        ("pretrained", "albef", ""),
        ("pretrained", "albef-retrieval", "mlm_head"),
        ("pretrained", "albef-grounding", "mlm_head"),
        ("ve", "albef", "image_projection, itm_head, mlm_head, temperature, text_projection"),
        ("nlvr", "albef", "image_projection, itm_head, mlm_head, temperature, text_projection"),
        ("assignment", "albef", "itm_head, mlm_head"),
    ],
)
def test_parts_without_a_place_are_left_out_aloud_and_no_others(
    kind: str, layout: str, lacking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": official(kind)}, tmp_path / "model.pth")
    assert run("convert", tmp_path / "model.pth", "--to", layout, "--out", tmp_path / "back") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "no place here" in line]
    assert (
        said
        == [f"left out: {layout} has no place here for {lacking}; whoever reads it back draws them at random"][
            : bool(lacking)
        ]
    )
    drawn = [sentence for sentence in read_foreign(tmp_path / "back").said if "drawn at random" in sentence]
    assert bool(drawn) == bool(lacking) and lacking in "".join(drawn)


@pytest.mark.parametrize(("kind", "length"), [("pretrained", 5), ("retrieval", 5), ("vqa", POSITIONS)])
def test_captions_are_cut_where_the_public_evaluation_cuts_them(
    kind: str, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 30 tokens, and here, where a text has 12 places, at 5; questions are read whole."""
    assert albef.CAPTION_TOKENS == 30
    monkeypatch.setattr(albef, "CAPTION_TOKENS", 5)
    torch.save({"model": official(kind)}, tmp_path / "model.pth")
    assert read_foreign(tmp_path / "model.pth").max_length == length
