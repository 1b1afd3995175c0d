"""UniT: padded pictures, computing no more than is read, and what a configuration may be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.parity.test_unit_plain import SIZES, SMALL_TASKS, TINY, draw_weights, padded
from trivium.errors import TriviumError
from trivium.layers.resnet import Convolution
from trivium.models.encoded import Detects, Encoded, EncodesImage, EncodesText
from trivium.models.unit import Unit, UnitConfig, UnitTask

IMAGES = UnitTask("kind", "labels", "image", 4, 2, num_queries=3)
GROUP = replace(
    TINY, tasks=(*SMALL_TASKS, IMAGES), bottleneck=False, backbone_norm="group", width=16, backbone_blocks=(1, 1, 2)
)


def make(config: UnitConfig = GROUP, dtype: torch.dtype = torch.float64) -> Unit:
    model = Unit(config).to(dtype)
    draw_weights(model, 0.2)
    return model


def pictures(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(4)
    return [torch.randn(1, 3, *size, generator=draw, dtype=torch.float64).to(dtype) for size in SIZES]


def words() -> tuple[Tensor, Tensor, Tensor]:
    mask_BT = torch.arange(7) < torch.tensor([7, 3, 5])[:, None]
    draw = torch.Generator().manual_seed(6)
    ids_BT = torch.randint(1, 50, (3, 7), generator=draw).where(mask_BT, 0)
    return ids_BT, mask_BT, torch.randint(0, 2, (3, 7), generator=draw)


def gradients(model: Unit, output: Tensor) -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(9)
    weight = torch.randn(output.shape, generator=draw).to(output)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for grad in torch.autograd.grad((output * weight).sum(), trained, None, True, allow_unused=True):
        yield torch.zeros(()).to(output) if grad is None else grad


def assert_same_gradients(model: Unit, found: Tensor, expected: Tensor) -> None:
    for mine, wanted in zip(gradients(model, found), gradients(model, expected), strict=True):
        torch.testing.assert_close(mine.expand_as(wanted), wanted, rtol=0, atol=1e-11 * max(1, float(wanted.norm())))


def test_the_published_model_has_as_many_parameters_as_are_published() -> None:
    pooler = 768 * 768 + 768  # of BERT; nothing reads it, and we have none
    for decoder, published in (("shared", 201_507_900), ("separate", 532_389_948)):
        with torch.device("meta"):
            model = Unit(UnitConfig(decoder=decoder))  # type: ignore[arg-type]
        assert sum(parameter.numel() for parameter in model.parameters()) + pooler == published


@pytest.fixture(params=["each size apart", "all together"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How pictures of different sizes are encoded: as on a processor, and as on a GPU."""
    if request.param == "all together":
        monkeypatch.setattr("trivium.models.unit_image.goes_apart", lambda device: False)
    return str(request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("norm", ["group", "frozen"])
def test_a_padded_picture_is_encoded_and_decoded_as_it_is_alone(norm: str, dtype: torch.dtype, bound: float) -> None:
    model = make(GROUP if norm == "group" else replace(GROUP, backbone_norm="frozen"), dtype)
    pixels, sizes_B2 = padded(pictures(dtype))
    image = model.encode_image(pixels, sizes_B2, "coco")
    together = model.decode("coco", image)
    assert image.mask is not None
    for row, picture in enumerate(pictures(dtype)):
        alone = model.encode_image(picture, None, "coco")
        for found, expected in (
            (image.states[row][image.mask[row]], alone.states[0]),
            (image.pooled[row], alone.pooled[0]),
            (together[:, row], model.decode("coco", alone)[:, 0]),
        ):
            error = ((found - expected).abs().max() / expected.abs().max()).item()
            assert error <= bound, f"{SIZES[row]}: {error:.2g}"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("norm", ["group", "frozen"])
def test_gradients_of_a_padded_batch_are_the_sums_of_its_pictures(norm: str) -> None:
    model = make(GROUP if norm == "group" else replace(GROUP, backbone_norm="frozen"))
    pixels, sizes_B2 = padded(pictures())
    together = model.decode("coco", model.encode_image(pixels, sizes_B2, "coco"))
    alone = torch.cat([model.decode("coco", model.encode_image(p, None, "coco")) for p in pictures()], dim=1)
    assert_same_gradients(model, together, alone)


def test_pictures_of_one_size_go_through_together_and_norms_into_the_weights_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In bfloat16 too, where the product of weights and norms is rounded once for all."""
    model = make(replace(GROUP, backbone_norm="frozen"), torch.float32)
    pixels, sizes_B2 = padded([*pictures(torch.float32), *pictures(torch.float32)])
    seen: list[tuple[int, ...]] = []
    model.image.backbone.register_forward_pre_hook(lambda _, inputs: seen.extend(tuple(x.shape) for x in inputs[0]))
    folded = mock.Mock(side_effect=Convolution.folded, autospec=True)
    monkeypatch.setattr(Convolution, "folded", lambda *arguments: folded(*arguments))
    with torch.autocast("cpu", torch.bfloat16):
        apart = model.encode_image(pixels, sizes_B2, "coco")
        assert sorted(seen) == sorted((2, 3, *size) for size in SIZES)
        convolutions = [each for each in model.modules() if isinstance(each, Convolution)]
        assert folded.call_count == len(convolutions)
        alone = [model.encode_image(picture, None, "coco") for picture in pictures(torch.float32)]
    assert apart.mask is not None
    for row, one in enumerate([*alone, *alone]):
        error = (apart.states[row][apart.mask[row]] - one.states[0]).float().norm() / one.states.float().norm()
        assert float(error.detach()) <= 1e-2  # products of two pictures and of one may round otherwise
    mine, wanted = (
        torch.cat([encoded.flatten() for encoded in gradients(model, output)])
        for output in (apart.pooled, torch.cat([one.pooled for one in [*alone, *alone]]))
    )
    assert float((mine - wanted).norm() / wanted.norm()) <= 2e-2


def test_of_a_text_whose_class_token_is_read_the_last_block_computes_no_more() -> None:
    model = make()
    class_alone = model.encode_text(*words(), "mnli")
    assert class_alone.states.shape[1] == 1
    tasks = tuple(replace(task, text="all") if task.name == "mnli" else task for task in GROUP.tasks)
    whole = Unit(replace(GROUP, tasks=tasks)).double()
    whole.load_state_dict(model.state_dict())
    every = whole.encode_text(*words(), "mnli")
    torch.testing.assert_close(class_alone.states, every.states[:, :1], rtol=0, atol=1e-12)
    assert class_alone.places is not None
    assert every.places is not None
    torch.testing.assert_close(class_alone.places, every.places[:, :1])
    # A text that was encoded whole is cut where it is decoded.
    torch.testing.assert_close(model.decode("mnli", None, class_alone), model.decode("mnli", None, every))


def test_labels_are_read_from_the_first_query_of_the_last_layer_and_no_other_is_computed_there() -> None:
    model = make()
    image = model.encode_image(torch.cat(pictures()[:1] * 3), None, "vqav2")
    text = model.encode_text(*words(), "vqav2")
    found = model.decode("vqav2", image, text)
    decoder: Any = model.decoders["shared"]
    with mock.patch.object(decoder, "forward", lambda *a: type(decoder).forward(decoder, *a[:4], False, 1)):
        every = model.decode("vqav2", image, text)
    assert every.shape == (TINY.decoder_layers, 3, 5, GROUP.width)
    torch.testing.assert_close(found, every[-1:, :, :1], rtol=0, atol=1e-12)
    assert_same_gradients(model, found, every[-1:, :, :1])


def test_queries_that_read_one_position_find_the_same_so_one_is_asked() -> None:
    model = make()
    text = model.encode_text(*words(), "sst2")
    found = model.decode("sst2", None, text)
    dropping = replace(GROUP, dropout=0.1)  # a model in training with dropout asks all of them
    with mock.patch.object(model, "config", dropping):
        every = model.train().decode("sst2", None, text)
    torch.testing.assert_close(found, every, rtol=0, atol=1e-12)
    assert_same_gradients(model, found, every)
    queries: Any = model.queries["sst2"]
    # The draw of parameters that all queries are: their gradient is nought either way.
    assert float(torch.autograd.grad(found.square().sum(), queries.weight)[0].abs().max()) <= 1e-12


def test_the_last_layer_alone_is_that_of_all() -> None:
    model = make()
    image = model.encode_image(pictures()[0], None, "coco")
    torch.testing.assert_close(model.decode("coco", image, last=True), model.decode("coco", image)[-1:])


def test_the_token_of_a_task_is_read_with_picture_and_text() -> None:
    model = make()
    for encode in (
        lambda task: model.encode_image(pictures()[0], None, task).states,
        lambda task: model.encode_text(*words(), task).states[:, :1],
    ):
        assert float((encode("vqav2") - encode("snli_ve")).detach().abs().max()) > 1e-3
        bare = make(replace(GROUP, num_task_tokens=0))
        image = [bare.encode_image(pictures()[0], None, task).states for task in ("vqav2", "snli_ve")]
        assert torch.equal(*image)


def test_objects_are_found_in_padded_pictures() -> None:
    model = make().eval()
    assert isinstance(model, Detects)
    assert isinstance(model, EncodesImage)
    assert isinstance(model, EncodesText)
    pixels, sizes_B2 = padded(pictures())
    found = model.detect(pixels, sizes_B2, "vg")
    head: Any = model.heads["vg"]
    for row, picture in enumerate(pictures()):
        seen = head(model.decode("vg", model.encode_image(picture, None, "vg")))
        for query in range(5):
            chance = seen.logits_LBQK[-1, 0, query].float().softmax(-1)
            label = int(chance[:-1].argmax())
            assert int(found.labels_BQ[row, query]) == label
            assert float(found.scores_BQ[row, query]) == pytest.approx(float(chance[label]))
            x, y, w, h = seen.boxes_LBQ4[-1, 0, query].tolist()
            expected = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
            assert found.boxes_BQ4[row, query].tolist() == pytest.approx(expected)
            strength = head.attributes(seen.hidden_LBQD[-1, 0, query : query + 1], torch.tensor([label]))[0]
            assert found.attributes_BQ is not None
            assert int(found.attributes_BQ[row, query]) == int(strength.argmax())


def test_boxes_are_float32_under_autocast() -> None:
    model = make(dtype=torch.float32)
    plain: Any = model.heads["coco"](model.decode("coco", model.encode_image(pictures(torch.float32)[0], None, "coco")))
    with torch.autocast("cpu", torch.bfloat16):
        image = model.encode_image(pictures(torch.float32)[0], None, "coco")
        seen: Any = model.heads["coco"](model.decode("coco", image))
    assert seen.boxes_LBQ4.dtype == torch.float32
    assert float((seen.boxes_LBQ4 - plain.boxes_LBQ4).abs().max()) < 0.1


def test_encodings_are_split_joined_taken_and_repeated_with_their_places() -> None:
    model = make()
    pixels, sizes_B2 = padded(pictures())
    image = model.encode_image(pixels, sizes_B2, "coco")
    again = Encoded.joined(image.split(2))
    for one, other in ((image.states, again.states), (image.places, again.places), (image.pooled, again.pooled)):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other)
    taken = image.taken(torch.tensor([2, 0]))
    torch.testing.assert_close(taken.pooled, image.pooled[[2, 0]])
    torch.testing.assert_close(model.decode("coco", taken), model.decode("coco", image)[:, [2, 0]])
    alone = model.encode_image(pictures()[0], None, "coco").repeated(2)
    torch.testing.assert_close(*model.decode("coco", alone).transpose(0, 1))


def test_parts_of_other_lengths_are_padded_when_they_are_joined() -> None:
    model = make()
    first, second, third = pictures()
    pixels, sizes_B2 = padded([first, second])
    for parts in (
        [model.encode_image(first, None, "coco"), model.encode_image(third, None, "coco")],
        [model.encode_image(pixels, sizes_B2, "coco"), model.encode_image(third, None, "coco")],
        [model.encode_image(torch.zeros_like(pixels), None, "coco"), model.encode_image(pixels, sizes_B2, "coco")],
    ):
        joined, rows = Encoded.joined(parts), [row for part in parts for row in part.split(1)]
        assert joined.mask is not None
        torch.testing.assert_close(joined.pooled, torch.cat([row.pooled for row in rows]))
        decoded = torch.cat([model.decode("coco", row) for row in rows], dim=1)
        torch.testing.assert_close(model.decode("coco", joined), decoded)


def test_a_configuration_survives_json() -> None:
    for config in (UnitConfig(), GROUP, UnitConfig.of_size("tiny"), UnitConfig.of_size("small", decoder="separate")):
        assert UnitConfig(**json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tasks": (SMALL_TASKS[0], SMALL_TASKS[0])}, "'coco' of a UniT cannot be built: there are two of this name"),
        ({"tasks": (SMALL_TASKS[0], replace(SMALL_TASKS[1], number=0))}, "number 0 is another task's too"),
        ({"tasks": (replace(SMALL_TASKS[0], number=16),)}, "number 16 has no row among 16 task tokens"),
        ({"tasks": (replace(SMALL_TASKS[0], reads="both"),)}, "it detects, so it reads the image alone, not 'both'"),
        ({"tasks": (replace(SMALL_TASKS[3], num_attributes=3),)}, "attributes are of detected objects"),
        ({"tasks": (replace(SMALL_TASKS[0], name="a.b"),)}, "hold no dot"),
        (
            {"tasks": (replace(SMALL_TASKS[0], name="items"),)},
            "'items' of a UniT cannot be built: torch keeps this name",
        ),
        ({"text_layers": 0}, "'vqav2' of a UniT cannot be built: it reads texts, and this model has no text encoder"),
    ],
)
def test_tasks_that_no_model_can_have_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TriviumError, match=sentence):
        replace(TINY, **changes)


def test_a_task_that_does_not_exist_or_reads_something_else_is_told() -> None:
    model = make()
    with pytest.raises(TriviumError, match=r"this UniT has no task 'hateful_memes': it has coco, vg, vqav2"):
        model.encode_image(pictures()[0], None, "hateful_memes")
    with pytest.raises(TriviumError, match="no task 'hateful_memes'"):
        model.decode("hateful_memes", None)
    with pytest.raises(TriviumError, match="the task 'sst2' reads no images"):
        model.encode_image(pictures()[0], None, "sst2")
    with pytest.raises(TriviumError, match="the task 'kind' reads no texts"):
        model.encode_text(*words(), "kind")
    with pytest.raises(TriviumError, match="the task 'sst2' detects nothing"):
        model.detect(pictures()[0], None, "sst2")
    with pytest.raises(TriviumError, match="no task of this UniT reads texts"):
        make(replace(GROUP, tasks=SMALL_TASKS[:1])).encode_text(*words())
