"""One step of fine-tuning against transformers' own classes, and what a head reads of each family.

float64: losses and gradients within 1e-9 of the largest value of each tensor.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor

from tests.flava_batches import TINY as TINY_FLAVA
from tests.flava_batches import assert_close, gradients, random_flava, split
from trivium.convert.bert import config_to_hf, to_hf
from trivium.invariance import unit
from trivium.invariance.finetune import TINY, fine_tuned, random_bert, text_batch
from trivium.methods.finetune import FineTuning
from trivium.methods.momentum import SoftTargets
from trivium.methods.pixels import Pixels
from trivium.models.finetuned import Gives, Reads, read, tells_segments_apart
from trivium.train.protocol import Batch, Images, Key
from trivium.train.step import backward, measure, step

THEIR_KIND = {
    "class": "single_label_classification",
    "number": "regression",
    "answers": "multi_label_classification",
}


@pytest.mark.parametrize("gives", ["class", "number", "answers"])
def test_a_step_on_bert_is_that_of_transformers(gives: Gives) -> None:
    """Theirs: pooler, tanh, linear; with our inner layer in the pooler's place both are the same function."""
    num_outputs = 1 if gives == "number" else 3
    ours = fine_tuned(random_bert(), "text", gives, num_outputs, TINY.width)
    their_config = transformers.BertConfig(
        **config_to_hf(TINY), num_labels=num_outputs, problem_type=THEIR_KIND[gives], classifier_dropout=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.BertForSequenceClassification(their_config).double().train()

    def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Ours, whose pooler is not read, under their names."""
        model = {n.removeprefix("backbone."): t for n, t in tensors.items() if n.startswith("backbone.")}
        model |= {f"pooler.{part}": tensors[f"head.inner.{part}"] for part in ("weight", "bias")}
        found = {f"bert.{name}": tensor for name, tensor in to_hf(model, TINY).items()}
        return found | {f"classifier.{part}": tensors[f"head.decoder.{part}"] for part in ("weight", "bias")}

    theirs.load_state_dict({n: t.clone() for n, t in renamed(ours.model.state_dict()).items()}, strict=True)
    batch = text_batch(5, gives, num_outputs)
    text = batch.texts[0]
    labels = next(iter(batch.targets.values()))
    output = theirs(
        input_ids=text.ids_BT, attention_mask=text.mask_BT.long(), token_type_ids=text.segments_BT,
        labels=labels if gives == "class" else labels.double(),
    )  # fmt: skip
    # transformers takes the mean over answers, we their sum: several answers of one question are one loss.
    (output.loss * (num_outputs if gives == "answers" else 1)).backward()
    sums, counts, _ = backward(ours, [batch], Key(0, "a task", 0))
    loss = float(sums["a task"] / counts["a task"]) / (num_outputs if gives == "answers" else 1)
    assert loss == pytest.approx(float(output.loss), rel=1e-9)
    absent = {n: torch.zeros_like(p) for n, p in ours.model.named_parameters() if p.grad is None}
    assert set(absent) == {"backbone.pooler.weight", "backbone.pooler.bias"}
    mine = renamed(gradients(ours.model) | absent)
    yours = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    biases = [name for name in yours if name.endswith("self.key.bias")]
    for name in biases:
        assert float(mine.pop(name).norm()) <= 1e-12
        yours.pop(name)
    assert_close(mine, yours, 1e-9)  # type: ignore[arg-type]


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_come_to_the_whole_batch(parts: int) -> None:
    batch = text_batch(8)
    method = fine_tuned(random_bert(), "text", "class", 3, TINY.width)
    whole, _, _ = backward(method, [batch], Key(0, "a task", 0))
    expected = {name: grad.clone() for name, grad in gradients(method).items()}
    method.zero_grad(set_to_none=True)
    sums, _, _ = backward(method, split(batch, parts), Key(0, "a task", 0))
    assert_close(sums, whole, 1e-12)
    assert_close({n: g for n, g in gradients(method).items() if "key" not in n}, expected, 1e-10)


def test_stats_count_what_is_right() -> None:
    batch = text_batch(8)
    method = fine_tuned(random_bert(), "text", "class", 3, TINY.width)
    batch.targets["label"] = method.outputs(batch).argmax(1)
    sums, _, _ = backward(method, [batch], Key(0, "a task", 0))
    assert float(sums["stat/correct"]) == 8


@pytest.mark.parametrize("reads", ["text", "image", "fused", "concatenated"])
def test_of_flava_no_more_is_computed_than_is_read_and_nothing_changes(reads: Reads) -> None:
    model = random_flava(replace(TINY_FLAVA, num_segments=2))
    text = text_batch(3).texts[0]
    pixels_BCHW = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    ids_BT, mask_BT, segments_BT = text.ids_BT, text.mask_BT, text.segments_BT
    image, words = model.encode_image(pixels_BCHW), model.encode_text(ids_BT, mask_BT, segments_BT)
    plain = {
        "text": words.tokens[:, 0],
        "image": image.tokens[:, 0],
        "fused": model.fuse(image, words).tokens[:, 0],
        "concatenated": torch.cat([image.tokens[:, 0], words.tokens[:, 0]], dim=1),
    }[reads]
    found = read(model, reads, pixels_BCHW, ids_BT, mask_BT, segments_BT)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)
    weight = torch.randn_like(plain)
    one, other = (
        torch.autograd.grad((rows * weight).sum(), list(model.parameters()), allow_unused=True, materialize_grads=True)
        for rows in (found, plain)
    )
    for mine, yours in zip(one, other, strict=True):
        torch.testing.assert_close(mine, yours, rtol=0, atol=1e-11)
    assert tells_segments_apart(model)
    assert not tells_segments_apart(random_flava(replace(TINY_FLAVA, num_segments=1)))


def test_pixels_are_normalised_on_the_way() -> None:
    model = random_flava()
    method = fine_tuned(model, "image", "class", 2, TINY_FLAVA.width)
    row_B = torch.arange(2)
    pixels_BCHW = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    batch = Batch("a task", row_B, row_B, (Images(pixels_BCHW, row_B),), (), {"label": torch.tensor([0, 1])})
    expected = method.model((pixels_BCHW.double() / 255 - 0.5) / 0.25, None)
    torch.testing.assert_close(method.outputs(batch), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", ["apart", "padded"])  # as on a processor, and as on a GPU
@pytest.mark.parametrize("reads", ["image", "concatenated"])
def test_padded_pictures_say_of_a_unit_what_each_says_alone(
    reads: Reads, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One picture, or a text and two, of which the second ones are padded to another size than the first ones."""
    monkeypatch.setattr("trivium.models.unit_image.goes_apart", lambda device: way == "apart")
    batch = unit.make_batch("vqav2", 4)
    if reads == "image":
        batch = replace(batch, texts=())
    else:
        more = unit.make_batch("vqav2", 4, seed=1).images[0]
        assert more.sizes_B2 is not None
        sizes_B2 = more.sizes_B2.minimum(torch.tensor([36, 32]))
        batch = replace(batch, images=(*batch.images, Images(more.pixels_BCHW[:, :, :36, :32], more.same_B, sizes_B2)))
    model = unit.random_unit()
    method = fine_tuned(model, reads, "class", 2, unit.TINY.width * (len(batch.images) + len(batch.texts)))
    together = method.outputs(batch)
    for row in range(len(batch)):
        vectors = []
        for images in batch.images:
            assert images.sizes_B2 is not None
            height, width = images.sizes_B2[row].tolist()
            alone = images.pixels_BCHW[row : row + 1, :, :height, :width].double()
            vectors.append(model.encode_image((alone / 255 - 0.5) / 0.25).pooled)
        for text in batch.texts:
            vectors.append(model.encode_text(text.ids_BT[row : row + 1], text.mask_BT[row : row + 1]).pooled)
        expected = method.model.head(torch.cat(vectors, dim=1))
        torch.testing.assert_close(together[row : row + 1], expected, rtol=0, atol=1e-10)
    assert float((together - together.roll(1, 0)).abs().max()) > 1e-6  # they do not say the same


def test_answers_are_in_the_unit_of_the_task() -> None:
    model = random_bert()
    outputs = torch.tensor([[0.0, 1.0, -1.0]])
    classes = fine_tuned(model, "text", "class", 3, TINY.width).model.answers(outputs)
    torch.testing.assert_close(classes, outputs.softmax(1))
    torch.testing.assert_close(
        fine_tuned(model, "text", "answers", 3, TINY.width).model.answers(outputs), outputs.sigmoid()
    )
    numbers = fine_tuned(model, "text", "number", 1, TINY.width, center=2.0, scale=5.0).model
    torch.testing.assert_close(numbers.answers(torch.tensor([[0.5]])), torch.tensor([[4.5]]))


def distilled(gives: Gives, **targets: float) -> FineTuning:
    """With a teacher that is not its student."""
    num_outputs = 1 if gives == "number" else 3
    plain = fine_tuned(random_bert(), "text", gives, num_outputs, TINY.width)
    soft = SoftTargets(**{"alpha": 0.4, "ramp": 20.0, "reach": 10.0} | targets)  # type: ignore[arg-type]
    method = FineTuning(plain.model, Pixels((0.5,) * 3, (0.25,) * 3), soft, num_steps=100, epoch_steps=10).double()
    assert method.teacher is not None
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return method.train()


@pytest.mark.parametrize(("step_number", "alpha"), [(0, 0.0), (5, 0.1), (50, 0.4)])
def test_distillation_is_the_published_sum(step_number: int, alpha: float) -> None:
    """(1 - alpha) CE(p, y) - alpha sum softmax(teacher) log softmax(student), after a ramp of 20 steps."""
    method, batch = distilled("class"), text_batch(6)
    method.schedule(step_number)
    sums, counts, _ = backward(method, [batch], Key(0, "a task", step_number))
    mine = gradients(method.model)
    inputs = (batch.texts[0].ids_BT, batch.texts[0].mask_BT, batch.texts[0].segments_BT)
    method.zero_grad()
    logits = method.model(None, *inputs)
    taught = method.teacher.copy(None, *inputs).detach()
    hard = torch.nn.functional.cross_entropy(logits, batch.targets["label"])
    soft = -(taught.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    plain = (1 - alpha) * hard + alpha * soft
    plain.backward()
    assert float(sums["a task"] / counts["a task"]) == pytest.approx(float(plain), rel=1e-12)
    assert_close(mine, gradients(method.model), 1e-9)
    assert all(parameter.grad is None for parameter in method.teacher.parameters())


@pytest.mark.parametrize("gives", ["number", "answers"])
def test_numbers_and_answers_are_taught_in_their_own_loss(gives: Gives) -> None:
    method, batch = distilled(gives), text_batch(6, gives, 3)
    method.schedule(50)
    sums, _, _ = backward(method, [batch], Key(0, "a task", 50))
    text = batch.texts[0]
    given = (None, text.ids_BT, text.mask_BT, text.segments_BT)
    with torch.no_grad():
        outputs, taught = method.model(*given), method.teacher.copy(*given)
    if gives == "number":
        value_B = batch.targets["value"].double()
        expected = 0.6 * (outputs[:, 0] - value_B).square() + 0.4 * (outputs[:, 0] - taught[:, 0]).square()
    else:
        target = 0.6 * batch.targets["answers"] + 0.4 * taught.sigmoid()
        p = outputs.sigmoid()
        expected = -(target * p.log() + (1 - target) * (1 - p).log())
    assert float(sums["a task"]) == pytest.approx(float(expected.sum()), rel=1e-9)


def test_the_teacher_follows_once_a_step_and_says_nothing_of_held_out_rows() -> None:
    method, batch = distilled("class"), text_batch(6)
    before = {name: tensor.clone() for name, tensor in method.teacher.copy.state_dict().items()}
    optimizer = torch.optim.SGD(method.model.parameters(), lr=0.1)
    assert step(method, [batch], Key(0, "a task", 50), optimizer).accepted
    for name, tensor in method.teacher.copy.state_dict().items():
        expected = 0.9 * before[name] + 0.1 * method.model.state_dict()[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-12)
    method.eval()
    hard = torch.nn.functional.cross_entropy(method.outputs(batch), batch.targets["label"])
    assert measure(method, [[batch]], Key(0, "a task", 0))["a task"] == pytest.approx(float(hard))
    assert not method.train().teacher.training and distilled("class", dropout=True).teacher.training


def test_without_distillation_there_is_no_copy() -> None:
    method = fine_tuned(random_bert(), "text", "class", 3, TINY.width)
    assert method.teacher is None
    assert all(name.startswith("model.") for name in method.state_dict())
