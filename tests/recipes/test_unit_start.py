"""A random start from which detection learns: each query has its place, and is given what lies there."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from trivium.bundle import Bundle
from trivium.data.transforms import ImageTransform
from trivium.errors import TriviumError
from trivium.models.unit import Unit, UnitConfig, UnitTask
from trivium.objectives.detection import Objects, match
from trivium.recipes.unit_start import SELF_ATTENTION, at_random, from_unit

TASK = UnitTask("vg", "detection", "image", 6, 1, num_queries=20, num_attributes=7)
CENTRES = torch.tensor([[(column + 0.5) / 5, (row + 0.5) / 4] for row in range(4) for column in range(5)])


def started(seed: int, **changes: Any) -> Unit:
    model = Unit(UnitConfig.of_size("tiny", tasks=(TASK,), text_layers=0, **changes)).eval()
    at_random(model, seed)
    return model


@torch.no_grad()
def found(model: Unit) -> Any:
    pixels_BCHW = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    return model.heads["vg"](model.decode("vg", model.encode_image(pixels_BCHW)))


@pytest.mark.parametrize("seed", [0, 1])
def test_boxes_begin_spread_over_the_picture_in_every_layer(seed: int) -> None:
    boxes_LBQ4 = found(started(seed)).boxes_LBQ4
    assert float((boxes_LBQ4[..., :2] - CENTRES).abs().max()) < 0.06
    assert float((boxes_LBQ4[..., 2:] - 0.3).abs().max()) < 0.06


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_object_is_given_to_the_query_of_its_place_at_once(seed: int) -> None:
    """Without anchors to whichever has the likeliest class by chance, another in every picture."""
    shift_M2 = torch.linspace(-0.04, 0.04, 40).view(20, 2)
    box_M4 = torch.cat([CENTRES + shift_M2, torch.full((20, 2), 0.25)], dim=1)
    label_M = torch.arange(20) % 5 + 1
    objects = Objects(torch.arange(2).repeat_interleave(20), label_M.repeat(2), box_M4.repeat(2, 1))

    def right(**changes: Any) -> float:
        seen = found(started(seed, **changes))
        matches = match(seen.logits_LBQK, seen.boxes_LBQ4, objects)
        return float((matches.query_P == matches.object_P % 20).float().mean())

    assert right() > 0.95
    assert right(anchored=False) < 0.5


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
def test_self_attention_begins_at_many_places(seed: int) -> None:
    """exp of the entropy of the encoder's attention over 64 places and the task token. At full scale it is below 10."""

    def places(model: Unit) -> float:
        seen: list[torch.Tensor] = []
        block: Any = model.image.blocks[0]
        heads = model.config.num_heads
        pixels_BCHW = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(3))

        def look(_: Any, given: tuple[torch.Tensor, ...]) -> None:
            query, key, _ = block.attention.qkv(given[0]).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            seen.append((query @ key.mT / math.sqrt(query.shape[3])).softmax(-1))

        with block.attention.register_forward_pre_hook(look):
            model.encode_image(pixels_BCHW)
        return float(torch.special.entr(seen[0]).sum(-1).mean().exp())

    model = started(seed)
    assert places(model) > 30
    block: Any = model.image.blocks[0]
    block.attention.qkv.weight[: 2 * model.config.image_width] /= SELF_ATTENTION
    assert places(model) < 10


@torch.no_grad()
def test_queries_attend_what_lies_near_them() -> None:
    """The first layer's attention to a picture without content, from the query in the upper left corner."""
    model = started(0)
    decoder: Any = model.decoders["shared"]
    block, places_NE = decoder.blocks[0], model.image(torch.zeros(1, 3, 128, 128), None, "vg")[1][0]
    queries: Any = model.queries["vg"]
    width = model.config.width
    query_QD, key_ND = (
        x @ w.T
        for x, w in zip((queries.weight, places_NE), block.cross_attention.qkv.weight.split(width)[:2], strict=True)
    )
    heads = model.config.num_heads
    scores_HQN = torch.einsum(
        "qhd,nhd->hqn", query_QD.unflatten(1, (heads, -1)), key_ND.unflatten(1, (heads, -1))
    ) / math.sqrt(width // heads)
    chance_QN = scores_HQN.softmax(-1).mean(0)
    side = torch.arange(8)
    centre_N2 = torch.stack([side.repeat(8), side.repeat_interleave(8)], dim=1).add(1) / 8
    expected_Q2 = chance_QN @ centre_N2
    assert float((expected_Q2 - CENTRES).norm(dim=1).mean()) < 0.2
    assert float((centre_N2.mean(0) - CENTRES).norm(dim=1).mean()) > 0.3  # what looking everywhere would give


@torch.no_grad()
def test_a_point_has_the_places_of_the_feature_map_at_it() -> None:
    model = started(0)
    places_ND = model.encode_image(torch.zeros(1, 3, 128, 128)).places
    assert places_ND is not None
    point_P2 = torch.tensor([[3 / 8, 6 / 8]])  # the far corner of the third column in the sixth row
    torch.testing.assert_close(model.places_of(point_P2)[0], places_ND[0, 5 * 8 + 2], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_words_pass_the_text_encoder_little_changed_at_first() -> None:
    """So that each task finds them there; at full scale it is the average over a sentence that comes out."""
    task = UnitTask("sst2", "labels", "text", 2, 7)
    model = Unit(UnitConfig.of_size("tiny", tasks=(task,))).eval()
    at_random(model, 0)
    assert model.text is not None
    ids_BT = torch.randint(5, 4000, (4, 12), generator=torch.Generator().manual_seed(0))

    def likeness() -> float:
        assert model.text is not None
        words_BTE = model.text.embeddings(ids_BT)
        return float(torch.cosine_similarity(words_BTE, model.text.encoder(words_BTE), dim=-1).mean())

    assert likeness() > 0.9
    for parameter in model.text.encoder.parameters():
        if parameter.ndim > 1:
            parameter.div_(0.3)
    assert likeness() < 0.6


@torch.no_grad()
def test_queries_of_a_new_task_are_spread_as_the_trained_decoder_sees_places() -> None:
    """Where a decoder is wider than the picture's encoder, what maps places into it was trained too."""
    config = UnitConfig.of_size("tiny", tasks=(TASK,), text_layers=0, image_width=64)
    trained = Unit(config)
    at_random(trained, 5)
    other = Unit(replace(config, tasks=(replace(TASK, name="coco"),)))
    at_random(other, 0)
    from_unit(other, Bundle("unit", trained, None, ImageTransform()), "it", seed=0)
    queries: Any = other.queries["coco"]
    gap_QD = queries.weight - trained.places_of(CENTRES)
    assert float(gap_QD.std()) == pytest.approx(0.3, abs=0.03)
    heads: Any = other.heads["coco"]
    assert float((heads.anchors.sigmoid()[:, :2] - CENTRES).abs().max()) < 1e-6


KIND = UnitTask("kind", "labels", "both", 2, 2)
SHAPE = UnitConfig.of_size(
    "tiny", tasks=(TASK, KIND), width=32, num_heads=4, mlp_width=32, decoder_layers=2, image_width=32, image_layers=1,
    backbone_widths=(8, 16), backbone_blocks=(1, 1), text_width=32, text_heads=2, text_mlp_width=32, text_layers=1,
    vocab_size=50, max_length=16,
)  # fmt: skip
LABELS = {"vg": ["", "a", "b", "c", "d", "e"], "vg.attributes": list("tuvwxyz"), "kind": ["yes", "no"]}


def taken_of(trained: UnitConfig, config: UnitConfig, **labels: list[str]) -> tuple[set[str], list[str]]:
    """The tensors that a model of this shape takes of a trained one, and the sentences on them."""
    start, model = Unit(trained), Unit(config)
    at_random(start, 5)
    at_random(model, 0)
    bundle = Bundle("unit", start, None, ImageTransform(), labels_of=LABELS)
    notes = from_unit(model, bundle, "it", 0, LABELS | {name.replace("__", "."): each for name, each in labels.items()})
    theirs = start.state_dict()
    fresh = Unit(config)
    at_random(fresh, 0)
    own, before = model.state_dict(), fresh.state_dict()
    changed = {name for name in own if not torch.equal(own[name], before[name])}
    assert all(torch.equal(own[name], theirs[name]) for name in changed)
    return changed, notes


def test_a_model_of_the_same_shape_and_labels_starts_as_the_trained_one() -> None:
    changed, notes = taken_of(SHAPE, SHAPE)
    spare = {"image.task_tokens.spare", "text_task_tokens.spare"}  # which nothing reads
    count = len(Unit(SHAPE).state_dict().keys() - spare)
    assert notes == [f"{count} of {count} tensors start as it has them"]
    matrices = {name for name, tensor in Unit(SHAPE).state_dict().items() if tensor.ndim > 1}
    assert matrices - changed == {"heads.vg.anchors"} | spare


def test_of_a_detr_the_backbone_alone_is_taken() -> None:
    detr = replace(SHAPE, tasks=(TASK,), text_layers=0, num_task_tokens=0, residual=False)
    changed, notes = taken_of(detr, replace(SHAPE, width=48))
    assert changed and all(name.startswith("image.backbone.") for name in changed)
    assert notes[0] == "it is a DETR: its backbone alone is taken, as in the paper"
    changed, notes = taken_of(detr, detr)  # to go on with it
    assert any(name.startswith("decoders.") for name in changed) and len(notes) == 1


def test_what_fits_in_a_part_alone_is_left() -> None:
    """Biases without their weights, and attention without what stands behind it."""
    changed, notes = taken_of(SHAPE, replace(SHAPE, mlp_width=48))
    assert "image.projection.weight" in changed and not any(
        ".blocks." in name and "text" not in name for name in changed
    )
    assert "decoders.shared" in notes[-1] and "image.blocks" in notes[-1]
    changed, _ = taken_of(SHAPE, replace(SHAPE, width=48))
    assert changed and not any(name.startswith(("decoders.", "heads.", "queries.")) for name in changed)


def test_more_queries_leave_what_corrects_their_boxes_as_it_was_trained() -> None:
    changed, notes = taken_of(SHAPE, replace(SHAPE, tasks=(replace(TASK, num_queries=30), KIND)))
    assert {f"heads.vg.boxes.{n}.weight" for n in range(3)} <= changed
    assert notes[-1] == "new are heads.vg, queries.vg" and "queries.vg.weight" not in changed


def test_another_size_is_refused() -> None:
    """Tables of tokens and of classes may have one shape in both."""
    with pytest.raises(TriviumError, match="it has no backbone and no block that fits this model: give a run of the"):
        taken_of(UnitConfig.of_size("tiny", tasks=(TASK,)), UnitConfig.of_size("small", tasks=(TASK,)))
    other = replace(SHAPE, mlp_width=48, backbone_widths=(8, 24), text_mlp_width=48)
    with pytest.raises(TriviumError, match="give a run of the same --size"):
        taken_of(SHAPE, other)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("num_heads", 2, "it has --model.num-heads 4 and this model 2: give the former"),
        ("text_heads", 4, "it has --model.text-heads 2 and this model 4"),
        ("residual", False, "it has --model.residual true and this model false"),
        ("dilated", False, "it has --model.dilated true and this model false"),
        ("backbone_eps", 0.0, "it has --model.backbone-eps 1e-05 and this model 0.0"),
    ],
)
def test_what_would_compute_another_thing_with_the_same_weights_is_refused(field: str, value: Any, says: str) -> None:
    with pytest.raises(TriviumError, match=says):
        taken_of(SHAPE, replace(SHAPE, **{field: value}))


def test_what_tells_other_labels_apart_starts_anew() -> None:
    others = ["", "f", "g", "h", "i", "j"]
    changed, notes = taken_of(SHAPE, SHAPE, vg=others, kind=["no", "yes"])
    assert "it knows other labels of vg: what tells them apart starts anew" in notes
    assert "it knows other labels of kind: what tells them apart starts anew" in notes and "new are heads." in notes[-1]
    heads = {name for name in changed if name.startswith("heads.")}
    assert heads == {f"heads.vg.boxes.{n}.weight" for n in range(3)} and "queries.vg.weight" in changed
    changed, _ = taken_of(SHAPE, SHAPE, vg__attributes=list("abcdefg"))
    assert "heads.vg.classes.weight" in changed and "heads.kind.decoder.weight" in changed
    assert not any(name.startswith("heads.vg.attributes.") for name in changed)
