"""UniT's released checkpoints and DETR's: told by their names, in and out to the bit, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from published_unit import PlainUnit
from safetensors.torch import load_file
from torch import Tensor

import trivium
from tests.parity.test_unit_plain import SMALL_TASKS, TINY, draw_weights
from trivium.bundle import Bundle
from trivium.cli import main
from trivium.convert.places import give
from trivium.convert.unit import (
    TRANSFORM,
    config_beside,
    detr_places,
    from_detr,
    from_mmf,
    to_detr,
    to_mmf,
)
from trivium.convert.unit_labels import LABELS, labels_of
from trivium.data.glue import GLUE
from trivium.data.image_text_tasks import ENTAILMENT
from trivium.data.tokenizer import BERT_SPECIALS, Tokenizer
from trivium.data.transforms import ImageTransform
from trivium.errors import TriviumError
from trivium.load import load
from trivium.models.unit import Unit, UnitConfig, UnitTask

State = dict[str, Tensor]
DETR = UnitConfig(
    tasks=(UnitTask("coco", "detection", "image", 7, 0, 6),), width=16, num_heads=4, mlp_width=40, decoder_layers=3,
    image_width=16, image_layers=2, backbone_widths=(4, 6, 8), backbone_blocks=(1, 2, 3), text_layers=0,
    num_task_tokens=0, residual=False,
)  # fmt: skip
RELEASED = {
    "coco single-task": {"tasks": SMALL_TASKS[:1], "decoder": "separate"},
    "vg single-task": {"tasks": SMALL_TASKS[1:2], "decoder": "separate"},
    "vqa single-task": {"tasks": SMALL_TASKS[2:3], "decoder": "separate"},
    "ve single-task": {"tasks": SMALL_TASKS[3:4], "decoder": "separate"},
    "glue single-task": {"tasks": SMALL_TASKS[4:5], "decoder": "separate"},
    "single-task without task tokens": {"tasks": SMALL_TASKS[:1], "decoder": "separate", "num_task_tokens": 0},
    "coco and vqa, shared": {"tasks": (SMALL_TASKS[0], SMALL_TASKS[2])},
    "all separate": {"decoder": "separate"},
    "all shared": {},
    "all shared without task tokens": {"num_task_tokens": 0},
}


def released(config: UnitConfig) -> State:
    plain = PlainUnit(config)
    draw_weights(plain, 0.05)
    state = {name: tensor.clone() for name, tensor in plain.official_state().items()}  # as a file: no two are one
    for name in state:
        if name.endswith("empty_weight"):
            state[name][-1] = 0.1
    return state


def detr() -> State:
    model = Unit(DETR)
    draw_weights(model, 0.05)
    return {name: tensor.clone() for name, tensor in give(model.state_dict(), detr_places(DETR)).items()}


@pytest.mark.parametrize("kind", RELEASED)
def test_released_in_and_out_is_the_same_to_the_bit(kind: str) -> None:
    config = replace(TINY, **RELEASED[kind])  # type: ignore[arg-type]
    state = released(config)
    found, tensors = from_mmf(state, config_beside(config))
    # Of a head that is not there no shape tells the width.
    assert replace(found, dropout=0.0, attribute_width=config.attribute_width) == config
    assert tensors.keys() == Unit(config).state_dict().keys()
    back = to_mmf(tensors, found)
    kept = {name for name in state if ".pooler." not in name}
    assert back.keys() == kept
    assert all(torch.equal(back[name], state[name]) for name in kept)
    again = from_mmf(back, config_beside(config))
    assert again[0] == found
    assert all(torch.equal(again[1][name], tensors[name]) for name in tensors)


def test_detr_in_and_out_is_the_same_to_the_bit() -> None:
    state = detr()
    counting = {"backbone.0.body.bn1.num_batches_tracked": torch.tensor(0)}
    found, tensors = from_detr(state | counting, config_beside(DETR))
    assert found == DETR
    assert tensors.keys() == Unit(DETR).state_dict().keys()
    back = to_detr(tensors, found)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_each_task_takes_its_row_of_the_table_of_tokens() -> None:
    state = released(TINY)
    _, tensors = from_mmf(state, config_beside(TINY))
    table = state["unit_base_model.transformer.task_embeddings_enc.weight"]
    assert torch.equal(tensors["image.task_tokens.of.vqav2.weight"], table[3:4])
    assert "text_task_tokens.of.coco.weight" not in tensors and "image.task_tokens.of.sst2.weight" not in tensors


def test_the_first_release_calls_the_base_by_another_name() -> None:
    state = released(TINY)
    old = {name.replace("unit_base_model.", "detr_model."): tensor for name, tensor in state.items()}
    expected, found = (from_mmf(names, config_beside(TINY)) for names in (state, old))
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


def test_what_no_shape_shows_is_as_released_unless_a_config_says_it() -> None:
    wide = replace(TINY, num_heads=8, text_width=64, text_heads=1)
    found, _ = from_mmf(released(wide), {})
    assert (found.num_heads, found.text_heads, found.dilated, found.backbone_eps) == (8, 1, True, 1e-5)
    found, _ = from_mmf(released(wide), {"num_heads": 2, "text_heads": 4, "dilated": False, "backbone_eps": 0.0})
    assert (found.num_heads, found.text_heads, found.dilated, found.backbone_eps) == (2, 4, False, 0.0)


OWN = {"residual": False, "eps": 1e-6, "text_eps": 1e-5, "pad_id": 7, "dropout": 0.3}  # of a model


@pytest.mark.parametrize("decoder", ["shared", "separate"])
def test_a_model_with_settings_of_its_own_comes_back_as_it_was(decoder: str) -> None:
    coco, vg, vqa, entailment, *_ = SMALL_TASKS
    tasks = (
        replace(entailment, number=11, text="all", max_length=5, gives="answers"), replace(vg, number=0),
        replace(vqa, reads="text", max_length=None), replace(coco, number=12),
    )  # fmt: skip
    config = replace(TINY, tasks=tasks, decoder=decoder, **OWN)  # type: ignore[arg-type]
    model = Unit(config)
    draw_weights(model, 0.05)
    beside = json.loads(json.dumps(config_beside(config)))
    found, tensors = from_mmf(to_mmf(model.state_dict(), config), beside)
    assert found == config
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())


def test_a_detr_with_settings_and_a_task_of_its_own_comes_back_as_it_was() -> None:
    task = replace(DETR.tasks[0], name="mugs", number=3)
    config = replace(DETR, tasks=(task,), **{**OWN, "residual": False})
    model = Unit(config)
    draw_weights(model, 0.05)
    found, tensors = from_detr(to_detr(model.state_dict(), config), json.loads(json.dumps(config_beside(config))))
    assert found == config
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())


def test_a_decoder_of_its_only_task_is_written_as_that_of_a_detr() -> None:
    config = replace(DETR, decoder="separate")
    model = Unit(config)
    draw_weights(model, 0.05)
    found, tensors = from_detr(to_detr(model.state_dict(), config), config_beside(config))
    assert found == DETR
    own = {name.replace("decoders.coco.", "decoders.shared."): t for name, t in model.state_dict().items()}
    assert own.keys() == tensors.keys() and all(torch.equal(tensors[name], tensor) for name, tensor in own.items())


@pytest.mark.parametrize("tasks", [["coco"], {"coco": 3}, {"coco": {"num_labels": 3}}, None])
def test_a_config_that_says_of_tasks_what_cannot_be_is_refused(tasks: Any) -> None:
    for read, state in ((from_mmf, released(TINY)), (from_detr, detr())):
        with pytest.raises(TriviumError, match="must say of tasks, by name, one or more of number, reads"):
            read(state, {"tasks": tasks})


def test_categories_of_coco_have_their_numbers() -> None:
    names = labels_of(UnitConfig())["coco"]
    assert len([name for name in names if name]) == 80
    assert (names[1], names[13], names[44], names[90]) == ("person", "stop sign", "bottle", "toothbrush")
    assert not names[0]


def test_the_published_model_stands_under_1342_names() -> None:
    with torch.device("meta"):
        state = to_mmf(Unit(UnitConfig()).state_dict(), UnitConfig())
    assert sum(name.startswith(BASE) for name in state) == 1342


def lacks(name: str) -> Callable[[State], object]:
    return lambda state: state.pop(name)


def renamed(old: str, new: str) -> Callable[[State], object]:
    def change(state: State) -> None:
        for name in [name for name in state if old in name]:
            state[name.replace(old, new)] = state.pop(name)

    return change


def shaped(name: str, *shape: int) -> Callable[[State], object]:
    return lambda state: state.update({name: torch.zeros(shape)})


def differs(name: str) -> Callable[[State], object]:
    return lambda state: state.update({name: state[name] + 1})


BASE = "unit_base_model."


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lacks("bert_projection.bias"), r"misses 1 tensor \(bert_projection.bias\)"),
        (lacks(f"{BASE}transformer.encoder.layers.0.norm1.weight"), "misses 1 tensor .*layers.0.norm1.weight"),
        (shaped("adapter.weight", 1), "has unexpected 1 tensor .*adapter.weight"),
        (renamed("detection_coco", "hateful_memes"), "was trained on hateful_memes, which is none of"),
        (lacks("task_embeddings_lang.weight"), r"misses 1 tensor \(task_embeddings_lang.weight\)"),
        (shaped("task_embeddings_lang.weight", 16, 7), r"has shape \[16, 7\] where its config makes \[16, 24\]"),
        (shaped(f"{BASE}input_proj.bias", 7), r"input_proj.bias has shape \[7\] where its config makes \[16\]"),
        (differs(f"{BASE}transformer.decoders.vl.vqa2.norm.bias"), "one tensor in UniT, but differ here"),
        (differs("bert_model.embeddings.LayerNorm.bias"), "one tensor in UniT, but differ here"),
        (renamed("conv3", "conv9"), "no ResNet of bottlenecks"),
    ],
)
def test_what_does_not_fit_is_refused(change: Callable[[State], object], sentence: str) -> None:
    state = released(TINY)
    change(state)
    with pytest.raises(TriviumError, match=sentence):
        from_mmf(state, config_beside(TINY))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tasks": (UnitTask("memes", "labels", "both", 2, 4),)}, "no data set for the task memes"),
        ({"tasks": (UnitTask("coco", "labels", "image", 2, 0),)}, "no data set for the task coco of labels"),
        ({"tasks": (UnitTask("vqav2", "detection", "image", 2, 0),)}, "no data set for the task vqav2 of detection"),
        ({"backbone_norm": "group"}, "no place for such a backbone"),
    ],
)
def test_what_mmf_has_no_place_for_is_not_written(changes: dict, sentence: str) -> None:
    model = Unit(replace(TINY, **changes))
    with pytest.raises(TriviumError, match=sentence):
        to_mmf(model.state_dict(), model.config)


def test_what_is_no_detr_is_not_written_as_one() -> None:
    for changes, sentence in (
        ({}, "several tasks"), ({"tasks": SMALL_TASKS[1:2]}, "attributes"),
        ({"tasks": SMALL_TASKS[2:3]}, "no detection"), ({"tasks": SMALL_TASKS[:1]}, "a text encoder"),
    ):  # fmt: skip
        model = Unit(replace(TINY, **changes))  # type: ignore[arg-type]
        with pytest.raises(TriviumError, match=sentence):
            to_detr(model.state_dict(), model.config)


def test_the_verb_brings_both_layouts_in_and_out_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, state, config, to in (("unit", released(TINY), TINY, "mmf-unit"), ("detr", detr(), DETR, "detr")):
        there = tmp_path / name
        there.mkdir()
        torch.save({"model": state}, there / "pytorch_model.bin")
        (there / "config.json").write_text(json.dumps(config_beside(config)))
        assert main(["convert", str(there), "--to", "trivium", "--out", str(tmp_path / f"{name}-ours")]) == 0
        said = capsys.readouterr().out
        assert ("left out, since nothing reads it: bert_model.module.pooler" in said) is (name == "unit")
        command = ["convert", str(tmp_path / f"{name}-ours"), "--to", to, "--out", str(tmp_path / f"{name}-back")]
        assert main(command) == 0
        back = load_file(tmp_path / f"{name}-back" / "model.safetensors")
        assert all(torch.equal(back[n], tensor) for n, tensor in state.items() if ".pooler." not in n)
        bundle = trivium.load(tmp_path / f"{name}-back")
        assert bundle.family == "unit"
        assert bundle.transform.size == 800
        if name == "unit":  # the numbers of its labels have names, but for classes that are not as many as COCO's
            assert bundle.labels_of is not None
            assert bundle.labels_of["snli_ve"] == ["entailment", "neutral", "contradiction"]
            assert "coco" not in bundle.labels_of
        expected, found = (torch.load(there / "pytorch_model.bin")["model"], bundle.model.state_dict())
        assert torch.equal(found["queries.coco.weight"], expected[
            "query_embed.weight" if name == "detr" else f"{BASE}query_embeds.detection.detection_coco.weight"
        ])  # fmt: skip


@pytest.mark.parametrize("to", ["mmf-unit", "detr"])
def test_words_and_names_lie_beside_the_weights(to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of COCO's 91 classes, too, whose names a file without any would be given."""
    words = [*BERT_SPECIALS, "what", "is", "it", "a", "Cat"]
    words += [f"w{n}" for n in range(TINY.vocab_size - len(words))]
    coco = replace(SMALL_TASKS[0], num_labels=91)
    if to == "detr":
        config, tokenizer = replace(DETR, tasks=(coco,)), None
    else:
        config, tokenizer = replace(TINY, tasks=(*SMALL_TASKS[1:4], coco)), Tokenizer.wordpiece(words, lowercase=False)
    names = {task.name: [f"{task.name} {n} é" for n in range(task.num_labels)] for task in config.tasks}
    for size, longest, told in ((800, 1333, False), (480, 800, True)):
        transform = ImageTransform(**(TRANSFORM | {"size": size, "longest": longest}))
        bundle = Bundle("unit", Unit(config), tokenizer, transform, max_length=9, labels_of=names)
        bundle.save(tmp_path / f"{size}")
        out = tmp_path / f"{size}-{to}"
        assert main(["convert", str(tmp_path / f"{size}"), "--to", to, "--out", str(out)]) == 0
        said = capsys.readouterr().out
        assert ("left out" in said) is told
        if told:
            assert "prepares them with size 800, longest 1333, and this model was made for size 480, longest 800" in (
                said
            )
        back = trivium.load(out)
        assert back.labels_of == names and back.model.config == config
        if tokenizer is not None:
            assert back.tokenizer is not None and back.max_length == 9
            assert back.tokenizer.encode(["what is a Cat w20 dog"], 9) == tokenizer.encode(["what is a Cat w20 dog"], 9)


def test_a_detr_in_the_dark_is_taken_for_dc5_and_says_so(tmp_path: Path) -> None:
    torch.save(detr(), tmp_path / "detr.pth")
    with pytest.warns(UserWarning, match=r"dilated \(DC5\): it is taken to be"):
        bundle = trivium.load(tmp_path / "detr.pth")
    assert bundle.model.config.dilated
    assert bundle.model.config.num_heads == 8


def test_answers_of_a_released_file_get_their_names_from_a_file_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It numbers 3,129 answers, whose list lies elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = replace(TINY, tasks=SMALL_TASKS[2:4])
    folder, root = tmp_path / "unit", tmp_path / "data"
    folder.mkdir()
    torch.save({"model": released(config)}, folder / "unit.pth")
    (folder / "config.json").write_text(json.dumps(config_beside(config)))
    words = [*BERT_SPECIALS, "what", "is", "it", "a", "cat"]
    (folder / "vocab.txt").write_text("\n".join([*words, *(f"w{n}" for n in range(50 - len(words)))]) + "\n")
    (root / "val2014").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(root / "val2014" / f"COCO_val2014_{1:012d}.jpg")
    asked = {"questions": [{"question_id": 1, "image_id": 1, "question": "what is it"}]}
    given = {"annotations": [{"question_id": 1, "multiple_choice_answer": "w1", "answers": [{"answer": "w1"}] * 10}]}
    (root / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps(asked))
    (root / "v2_mscoco_val2014_annotations.json").write_text(json.dumps(given))
    picture = next((root / "val2014").iterdir())
    suite = ("--suite", "unit", "--task", "VQAv2", "--data.root", str(root), "--out", str(tmp_path / "out"))
    says = 'this UniT\'s labels of vqav2 are not known: put a labels.json that has them, as in {"vqav2": ["yes",'
    for path in (folder / "unit.pth", tmp_path / "plain"):
        if path.name == "plain":
            assert main(["convert", str(folder / "unit.pth"), "--to", "trivium", "--out", str(path)]) == 0
        capsys.readouterr()
        assert main(["ask", str(path), "--image", str(picture), "--question", "what is it"]) == 2
        assert says in capsys.readouterr().err
        assert main(["evaluate", str(path), *suite]) == 2
        assert says in capsys.readouterr().err
    judged = load(tmp_path / "plain").ask(picture, "it is a cat", task="snli_ve")
    assert sorted(each.text for each in judged) == ["contradiction", "entailment", "neutral"]

    (folder / "labels.json").write_text('["w1", "w2"]')
    assert main(["ask", str(folder / "unit.pth"), "--image", str(picture), "--question", "what is it"]) == 2
    assert "labels.json names no task: it must hold a JSON object" in capsys.readouterr().err
    (folder / "labels.json").write_text(json.dumps({"vqav2": [f"w{n}" for n in range(11)]}))
    assert main(["convert", str(folder / "unit.pth"), "--to", "trivium", "--out", str(tmp_path / "named")]) == 0
    [best] = load(tmp_path / "named").ask(picture, "what is it", k=1)
    assert main(["evaluate", str(tmp_path / "named"), *suite]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert found["VQAv2.dev.accuracy"]["value"] == float(best.text == "w1")


def test_names_of_classes_are_those_that_readers_of_their_data_give() -> None:
    for name, files in GLUE.items():
        assert name not in LABELS or LABELS[name] == list((files.labels or {}).values())
    assert LABELS["snli_ve"] == list(ENTAILMENT)
