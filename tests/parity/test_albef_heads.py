"""ALBEF's writer of answers and its second blocks against plain constructions out of transformers' BERT.

float64 at tiny size: within 1e-9 of the largest value of each tensor. float32 at base size: losses within 1e-5 of their
size, each gradient within 1e-4 of its norm.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from published_albef import TextEncoder
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.bert.modeling_bert import BertLayer

from tests.parity.test_albef_published import assert_close_in_float32, assert_equal, key_biases
from trivium.convert.bert import to_hf
from trivium.invariance.albef import TINY, make_batch
from trivium.models.albef import Albef, AlbefConfig
from trivium.models.albef_heads import AnswerDecoder, TwoPictures, decoder_config
from trivium.models.encoded import Encoded
from trivium.objectives.tasks import written_answers

CLS, SEP, PAD = 2, 3, 0
BASE = replace(AlbefConfig(), dropout=0.0, image_size=64)  # 17 image tokens: what is compared here reads states of them


def drawn(module: nn.Module, seed: int = 7, std: float = 0.05) -> Any:
    """Every tensor drawn: nothing is zero or one by luck."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            centre = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(centre + std * torch.randn(parameter.shape, generator=generator))
    return module.double()


def writer(config: AlbefConfig = TINY, seed: int = 7, std: float = 0.05) -> AnswerDecoder:
    return drawn(AnswerDecoder(decoder_config(config)), seed, std)


def their_writer(ours: AnswerDecoder) -> Any:
    """BertLMHeadModel of the public code: causal, cross-attention in every layer."""
    shape = ours.config
    config = transformers.BertConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.width, num_attention_heads=shape.num_heads,
        intermediate_size=shape.mlp_width, num_hidden_layers=shape.num_layers,
        max_position_embeddings=shape.max_length, layer_norm_eps=shape.eps, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, is_decoder=True, add_cross_attention=True, pad_token_id=shape.pad_id,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.BertLMHeadModel(config).to(next(ours.parameters()).dtype)
    state = to_hf(ours.state_dict(), ours.config)
    state |= {"cls.predictions.decoder.weight": state["bert.embeddings.word_embeddings.weight"],
              "cls.predictions.decoder.bias": state["cls.predictions.bias"]}  # fmt: skip
    found = theirs.load_state_dict({n: t.clone() for n, t in state.items()}, strict=False)
    assert not found.unexpected_keys and all("position_ids" in name for name in found.missing_keys)
    theirs.tie_weights()
    return theirs


def question(rows: int = 4, length: int = 6, width: int = TINY.width) -> Encoded:
    draw = torch.Generator().manual_seed(3)
    mask_BS = torch.arange(length) < torch.tensor([[6], [3], [5], [4]])[:rows]
    states_BSD = torch.randn(rows, length, width, generator=draw, dtype=torch.float64)
    return Encoded(states_BSD, mask_BS, nn.Identity(), None)


def answers(number: int, longest: int = 4, seed: int = 5) -> Tensor:
    """[CLS], one to `longest` words, [SEP], pads: int64 [number, longest + 2]. Several begin alike."""
    draw = torch.Generator().manual_seed(seed)
    ids_KT = torch.full((number, longest + 2), PAD)
    ids_KT[:, 0] = CLS
    for row in ids_KT:
        words = int(torch.randint(1, longest + 1, (1,), generator=draw))
        row[1 : words + 1] = torch.randint(5, 15, (words,), generator=draw)
        row[words + 1] = SEP
    return ids_KT


@pytest.mark.parametrize("size", ["tiny", pytest.param("base", marks=pytest.mark.slow)])
def test_a_weighted_answer_costs_what_it_costs_in_the_public_code(size: str) -> None:
    """model_vqa.py: the sum of cross-entropies of an answer times its weight, over the number of questions; and with a
    teacher alpha of it what its soft labels cost."""
    config, std, dtype = (TINY, 0.05, torch.float64) if size == "tiny" else (BASE, 0.02, torch.float32)
    fused = question(3, width=config.width)
    ours, teacher = (writer(config, seed, std).to(dtype) for seed in (7, 8))
    theirs, their_teacher = their_writer(ours), their_writer(teacher)
    ids_RT, row_R = answers(5), torch.tensor([0, 0, 1, 2, 2])
    weight_R, alpha = torch.tensor([0.7, 0.3, 1.0, 0.5, 0.5], dtype=dtype), 0.4
    states, their_states = (fused.states.to(dtype, copy=True).requires_grad_() for _ in range(2))

    def words(model: AnswerDecoder, memory: Tensor) -> Tensor:
        read = model.read(Encoded(memory, fused.mask, nn.Identity(), None)).of_rows(row_R)
        return model.predict_words(model.states(ids_RT[:, :-1], read)[0])

    def loss_of_ours(memory: Tensor) -> Tensor:
        asked_RQ = ids_RT[:, 1:]
        real_RQ = asked_RQ != PAD
        logits_MV, soft_MV = (words(model, memory)[real_RQ] for model in (ours, teacher))
        weight_M = weight_R[:, None].expand_as(real_RQ)[real_RQ]
        hard = written_answers(logits_MV, asked_RQ[real_RQ], weight_M)
        soft = written_answers(logits_MV, soft_MV.softmax(-1).detach(), weight_M)
        return ((1 - alpha) * hard + alpha * soft) / 3

    def loss_of_theirs(memory: Tensor) -> Tensor:
        arguments = {"attention_mask": (ids_RT != PAD).long(), "encoder_hidden_states": memory[row_R],
                     "encoder_attention_mask": fused.mask[row_R].long()}  # fmt: skip
        logits = theirs(ids_RT, **arguments).logits[:, :-1]
        with torch.no_grad():
            soft = their_teacher(ids_RT, **arguments).logits[:, :-1].softmax(-1)
        labels = ids_RT.masked_fill(ids_RT == PAD, -100)[:, 1:]
        hard = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
        distilled = (-(logits.log_softmax(-1) * soft).sum(-1) * (labels != -100)).sum(1)
        return (weight_R * ((1 - alpha) * hard + alpha * distilled)).sum() / 3

    mine, yours = loss_of_ours(states), loss_of_theirs(their_states)
    assert float(mine.detach()) == pytest.approx(float(yours.detach()), rel=1e-9 if size == "tiny" else 1e-5)
    mine.backward(), yours.backward()
    assert states.grad is not None and their_states.grad is not None
    grads = to_hf({n: p.grad for n, p in ours.named_parameters() if p.grad is not None}, ours.config)
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    expected["cls.predictions.bias"] = expected.get("cls.predictions.bias", theirs.cls.predictions.bias.grad)
    mine_all = {n: t for n, t in grads.items() if n in expected} | {"states": states.grad}
    assert expected.keys() - mine_all.keys() <= {"cls.predictions.decoder.bias"}
    expected = {n: t for n, t in expected.items() if n in mine_all} | {"states": their_states.grad}
    assert len(expected) == sum(1 for _ in theirs.parameters()) + 1
    if size == "base":
        assert_close_in_float32(mine_all, expected)
        return
    assert_equal(mine_all, expected)
    biases = key_biases({n: t for n, t in mine_all.items() if n != "states"})
    assert all(each <= 1e-9 for each in biases.values())


def ranked_as_published(theirs: Any, fused: Encoded, ids_KT: Tensor, k: int, first_twice: bool) -> Tensor:
    """rank_answer of model_vqa.py, whole sequences one question after the other."""
    scores = torch.full((len(fused.states), len(ids_KT)), -torch.inf, dtype=torch.float64)
    for b, memory in enumerate(fused.states):
        kept = memory[fused.mask[b]][None]
        first = theirs(torch.tensor([[CLS]]), encoder_hidden_states=kept).logits[0, 0].log_softmax(-1)
        for place in first[ids_KT[:, 1]].topk(k).indices.tolist():
            ids = ids_KT[place][ids_KT[place] != PAD][None]
            logits = theirs(ids, encoder_hidden_states=kept).logits[0, :-1]
            scores[b, place] = -F.cross_entropy(logits, ids[0, 1:], reduction="sum")
            if first_twice:
                scores[b, place] += first[ids[0, 1]]
    return scores


@pytest.mark.parametrize("k", [1, 5, 12])
@pytest.mark.parametrize("first_twice", [False, True])
def test_ranking_a_list_is_reading_every_answer_to_its_end(
    k: int, first_twice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trivium.models.albef_heads.LOGITS_AT_ONCE", 3 * TINY.vocab_size)
    monkeypatch.setattr("trivium.models.albef_heads.ROWS_AT_ONCE", 3 * k)
    ours, fused, ids_KT = writer().eval(), question(), answers(12)
    theirs = their_writer(ours).eval()
    assert len(set(ids_KT[:, 1].tolist())) < 12  # some begin alike
    with torch.no_grad():
        expected = ranked_as_published(theirs, fused, ids_KT, k, first_twice)
        found = ours.rank(fused, ids_KT, k, first_word_twice=first_twice)
    if k == 12:
        assert torch.allclose(found, expected, rtol=0, atol=1e-11)
    else:  # of answers that begin alike either may be among the k
        assert (found > -torch.inf).sum(1).tolist() == [k] * len(fused.states)
        whole = ranked_as_published(theirs, fused, ids_KT, 12, first_twice)
        kept = found > -torch.inf
        assert torch.allclose(found[kept], whole[kept], rtol=0, atol=1e-11)


def test_writing_freely_finds_the_likeliest_of_all_there_are() -> None:
    """Three words and [SEP]: every answer of up to three words, by brute force. A beam for each finds the best."""
    config = replace(decoder_config(TINY), vocab_size=5)
    ours, fused = drawn(AnswerDecoder(config)).eval(), question(2)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(4)
    end, start, words = 3, 2, [0, 1, 2, 4]
    every = [[]]
    ended: list[list[int]] = []
    for _ in range(3):
        ended += [[*ids, end] for ids in every]
        every = [[*ids, word] for ids in every for word in words]
    everything = ended + every  # what has no end after three words too
    with torch.no_grad():
        for b in range(2):
            one = Encoded(fused.states[b : b + 1], fused.mask[b : b + 1], nn.Identity(), None)
            likely = []
            for ids in everything:
                states, _ = ours.states(torch.tensor([[start, *ids[:-1]]]), ours.read(one))
                logs = ours.predict_words(states[0]).log_softmax(-1)
                likely.append(float(logs[range(len(ids)), ids].sum()))
            order = sorted(range(len(likely)), key=lambda n: -likely[n])[:5]
            found, scores = ours.write(fused, start, end, 5, 3)
            assert scores[b].tolist() == pytest.approx([likely[n] for n in order], rel=1e-9)
            for ids, n in zip(found[b].tolist(), order, strict=True):
                assert ids[: len(everything[n])] == everything[n]
            greedy, _ = ours.write(one, start, end, 1, 3)
            word = ours.predict_words(ours.states(torch.tensor([[start]]), ours.read(one))[0])[0, 0].argmax()
            assert int(greedy[0, 0, 0]) == int(word)


class TheirPairs(nn.Module):
    """model_nlvr.py: eighteen layers of which the twelve last stand in pairs that share keys and values."""

    def __init__(self, model: Albef) -> None:
        super().__init__()
        encoder = TextEncoder(replace(model.config, fusion_layers=2 * model.config.fusion_layers))
        self.embeddings, self.layer = encoder.bert.embeddings, encoder.bert.encoder.layer
        self.text_layers = model.config.text_layers
        for first in range(self.text_layers, len(self.layer), 2):
            one, other = self.layer[first].crossattention.self, self.layer[first + 1].crossattention.self
            other.key, other.value = one.key, one.value
        self.cls_head = nn.Sequential(
            nn.Linear(model.config.width, model.config.width), nn.ReLU(), nn.Linear(model.config.width, 2)
        )

    def forward(self, ids_BT: Tensor, mask_BT: Tensor, images: tuple[Tensor, Tensor]) -> Tensor:
        states = self.embeddings(input_ids=ids_BT)
        additive = (1.0 - mask_BT[:, None, None].to(states)) * -10000.0
        for number, layer in enumerate(self.layer):
            assert isinstance(layer, BertLayer)
            beside = images[(number - self.text_layers) % 2] if number >= self.text_layers else None
            states = layer(states, additive, encoder_hidden_states=beside)
        return self.cls_head(states[:, 0])


@pytest.mark.parametrize("size", ["tiny", pytest.param("base", marks=pytest.mark.slow)])
def test_a_statement_on_two_pictures_is_judged_as_in_the_public_code(size: str) -> None:
    from trivium.convert.albef import Layout, to_official

    config, std, dtype = (TINY, 0.05, torch.float64) if size == "tiny" else (BASE, 0.02, torch.float32)
    model, batch = drawn(Albef(config), 0, std).to(dtype), make_batch(5)
    head = drawn(TwoPictures(decoder_config(config), config.width, 2), std=std).to(dtype)
    theirs = TheirPairs(model).to(dtype)
    layout = Layout(frozenset({"text_encoder.", "cls_head."}), under_bert=False, two_pictures=True)

    def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
        found = to_official(state, config, layout)
        found = {n.removeprefix("text_encoder."): t for n, t in found.items() if not n.endswith("position_ids")}
        return {n.removeprefix("encoder."): t for n, t in found.items()}

    def whole(state_of: Any) -> dict[str, Tensor]:
        return dict(state_of(model)) | {f"head.{name}": tensor for name, tensor in state_of(head)}

    theirs.load_state_dict({n: t.clone() for n, t in renamed(whole(lambda m: m.state_dict().items())).items()})
    draw = torch.Generator().manual_seed(4)
    images = torch.randn(2, 5, 17, config.width, generator=draw, dtype=torch.float64).to(dtype)
    mine, yours = images.clone().requires_grad_(), images.clone().requires_grad_()
    text, label_B = batch.texts[0], torch.tensor([0, 1, 1, 0, 1])
    logits = head.judge(model.fusion, model.encode_text(text.ids_BT, text.mask_BT), mine.flatten(0, 1))
    expected = theirs(text.ids_BT, text.mask_BT, (yours[0], yours[1]))
    assert torch.allclose(logits, expected, rtol=0, atol=1e-11 if size == "tiny" else 1e-5)
    F.cross_entropy(logits, label_B).backward()
    F.cross_entropy(expected, label_B).backward()
    assert mine.grad is not None and yours.grad is not None
    grads = renamed(whole(lambda m: [(n, torch.zeros_like(p) if p.grad is None else p.grad)
                                     for n, p in m.named_parameters()]))  # fmt: skip
    theirs_all = {n: p.grad for n, p in theirs.named_parameters(remove_duplicate=False)}
    grads, theirs_all = grads | {"images": mine.grad}, theirs_all | {"images": yours.grad}
    assert set(grads) == set(theirs_all)
    (assert_equal if size == "tiny" else assert_close_in_float32)(grads, theirs_all)
