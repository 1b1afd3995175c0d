"""BERT's converter: every layout of names that BERTs come in, and what is refused or left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import trivium
from tests.convert.peers import WORDS, save_with_tokenizer, shuffled
from trivium.cli import main
from trivium.convert.bert import config_to_hf, from_hf, to_hf
from trivium.errors import TriviumError
from trivium.models.bert import Bert

State = dict[str, Tensor]
SHAPE = {
    "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 30,
    "max_position_embeddings": 12,
}  # fmt: skip


def bert(kind: str = "BertForPreTraining", **changes: object) -> tuple[State, dict]:
    model = shuffled(getattr(transformers, kind)(transformers.BertConfig(**SHAPE, **changes)))
    return dict(model.state_dict()), model.config.to_dict()


def renamed(state: State, change: Callable[[str], str]) -> State:
    return {change(name): tensor for name, tensor in state.items()}


def old_norms(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


@pytest.mark.parametrize("layout", ["today", "gamma and beta", "bare", "sentence-transformers", "counting buffers"])
def test_every_layout_of_names_gives_the_same_model(layout: str) -> None:
    state, config = bert("BertForMaskedLM" if layout in ("today", "gamma and beta") else "BertModel")
    expected_config, expected, _ = from_hf(state, config)
    if layout == "gamma and beta":
        state = renamed(state, old_norms)
        assert any(name.endswith("gamma") for name in state)
    if layout == "bare":
        state = renamed(state, lambda name: f"bert.{name}")
    if layout == "sentence-transformers":
        state = renamed(state, lambda name: f"0.auto_model.{name}")
    if layout == "counting buffers":
        state["embeddings.position_ids"] = torch.arange(12)[None]
    found_config, found, said = from_hf(state, config)
    assert found_config == expected_config
    assert not said
    assert found.keys() == expected.keys() == Bert(found_config).state_dict().keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_head_is_found_under_one_of_its_two_names_and_its_matrix_may_be_absent() -> None:
    state, config = bert("BertForMaskedLM")
    _, expected, _ = from_hf(state, config)
    for absent in (["cls.predictions.bias"], ["cls.predictions.decoder.bias", "cls.predictions.decoder.weight"]):
        _, found, _ = from_hf({name: tensor for name, tensor in state.items() if name not in absent}, config)
        assert found.keys() == expected.keys()
        assert torch.equal(found["mlm_head.bias"], expected["mlm_head.bias"])


def test_what_the_model_has_no_place_for_is_named() -> None:
    state, config = bert("BertForPreTraining")
    found, tensors, said = from_hf(state, config)
    assert found.pooler
    assert found.mlm_head
    assert said == [
        "left out, since the model has no place for it: cls.seq_relationship.bias, cls.seq_relationship.weight"
    ]
    state, config = bert("BertForSequenceClassification")
    found, tensors, [sentence] = from_hf(state, config)
    assert "classifier.weight" in sentence
    assert not found.mlm_head
    assert tensors.keys() == Bert(found).state_dict().keys()


def test_there_and_back_is_the_same_to_the_bit() -> None:
    for kind, head in (("BertModel", False), ("BertForMaskedLM", True)):
        state, config = bert(kind)
        ours, tensors, _ = from_hf(state, config)
        back = to_hf(tensors, ours)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], state[name]) for name in state)
        assert config_to_hf(ours)["architectures"] == [kind]
        assert ours.mlm_head is head


def lacks(name: str) -> Callable[[State, dict], None]:
    return lambda state, config: state.pop(name)


def also(name: str) -> Callable[[State, dict], None]:
    return lambda state, config: state.update({name: torch.zeros(1)})


def says(field: str, value: object) -> Callable[[State, dict], None]:
    return lambda state, config: config.update({field: value})


def untied(state: State, config: dict) -> None:
    state["cls.predictions.decoder.weight"] = state["cls.predictions.decoder.weight"] + 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lacks("bert.encoder.layer.1.attention.self.key.weight"), "misses 1 tensor .*layer.1.attention.self.key"),
        (lacks("cls.predictions.transform.LayerNorm.bias"), "misses 1 tensor .*transform.LayerNorm.bias"),
        (also("bert.encoder.layer.7.output.dense.bias"), "has unexpected 1 tensor .*layer.7"),
        (also("adapter.weight"), "has unexpected 1 tensor .*adapter.weight"),
        (says("hidden_act", "relu"), "hidden_act is 'relu'"),
        (says("position_embedding_type", "relative_key"), "position_embedding_type is 'relative_key'"),
        (says("model_type", "roberta"), 'model_type "roberta"'),
        (says("vocab_size", 31), r"shape \[30, 24\] where its config makes \[31, 24\]"),
        (untied, "are one tensor in BERT, but differ"),
    ],
)
def test_what_does_not_fit_is_refused(change: Callable[[State, dict], None], sentence: str) -> None:
    state, config = bert("BertForMaskedLM")
    change(state, config)
    with pytest.raises(TriviumError, match=sentence):
        from_hf(state, config)


def test_the_verb_brings_a_bert_in_and_out_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = transformers.BertForPreTraining(transformers.BertConfig(**{**SHAPE, "vocab_size": len(WORDS)}))
    save_with_tokenizer(shuffled(model), tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "theirs"), "--to", "trivium", "--out", str(tmp_path / "ours")]) == 0
    assert "left out, since the model has no place for it: cls.seq_relationship.bias" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "ours"), "--to", "hf-bert", "--out", str(tmp_path / "back")]) == 0
    there, back = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    kept = {name for name in there if not name.startswith("cls.seq_relationship")}
    assert all(torch.equal(there[name], back[name]) for name in kept)
    bundle = trivium.load(tmp_path / "ours")
    assert bundle.family == "bert"
    texts = ["a red mug .", "cats on the mat"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    peer = transformers.BertModel.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        expected = peer(**tokenizer(texts, padding=True, return_tensors="pt")).last_hidden_state
    found = bundle.encode_text(texts)
    assert found.mask is not None
    assert torch.allclose(found.tokens[found.mask], expected[found.mask], rtol=0, atol=1e-6)
    with pytest.raises(TriviumError, match=r"this model \(bert\) reads no pictures"):
        bundle.encode_image(torch.zeros(1, 3, 16, 16))


def test_weights_without_their_config_are_refused(tmp_path: Path) -> None:
    state, _ = bert("BertModel")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(TriviumError, match=r"needs the config\.json"):
        trivium.load(tmp_path)
