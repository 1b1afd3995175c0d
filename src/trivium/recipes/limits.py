"""What the numbers of a recipe must be, and the sentence for one that is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fnmatch import filter as those_like
from typing import Any

from trivium.errors import TriviumError

Rule = tuple[Callable[[Any], bool], str]

POSITIVE: Rule = (lambda value: value > 0, "a number above 0")
NOT_NEGATIVE: Rule = (lambda value: value >= 0, "0 or more")
SHARE: Rule = (lambda value: 0 <= value <= 1, "a share between 0 and 1")
SOME: Rule = (lambda value: value >= 1, "a whole number of 1 or more")
SHARES: Rule = (lambda pair: 0 < pair[0] <= pair[1] <= 1, "two shares, the smaller first, above 0 and at most 1")
EACH: Rule = (lambda values: values and min(values) >= 1, "one or more whole numbers of 1 or more")
TOKENS: Rule = (lambda value: value >= 3, "3 tokens or more: [CLS], [SEP] and a word between them")
MOMENTA: Rule = (lambda pair: all(0 <= value < 1 for value in pair), "two numbers of 0 or more and below 1")
PROBABILITIES: Rule = (lambda values: all(0 <= value <= 1 for value in values), "three shares between 0 and 1")

RULES: dict[str, Rule] = {  # by path; * stands for any name
    **dict.fromkeys(("model.width", "model.num_heads", "model.mlp_width", "model.image_size"), SOME),
    **dict.fromkeys(("model.image_layers", "model.text_layers", "model.multimodal_layers"), SOME),
    **dict.fromkeys(("model.patch_size", "model.vocab_size", "model.num_codes"), SOME),
    "model.max_length": TOKENS,
    **dict.fromkeys(("model.image_width", "model.image_heads", "model.image_mlp_width"), SOME),
    **dict.fromkeys(("model.text_width", "model.text_heads", "model.text_mlp_width"), SOME),
    "model.num_segments": SOME,
    "model.projection_width": SOME,
    "model.start_logit_scale": (lambda value: 1 <= value <= 100, "between 1 and 100"),
    "model.eps": POSITIVE,
    "model.dropout": (lambda value: 0 <= value < 1, "0 or more and below 1"),
    **dict.fromkeys(
        [f"objectives.{name}" for name in ("mim", "mlm", "mmm_image", "mmm_text", "itm", "contrastive")], NOT_NEGATIVE
    ),
    **dict.fromkeys([f"objectives.{name}" for name in ("classes", "box", "giou", "attributes")], NOT_NEGATIVE),
    "objectives.num_ranks": SOME,
    **dict.fromkeys(("model.num_groups", "model.blocks_per_group", "model.code_width"), SOME),
    **dict.fromkeys(("annealing.start_temperature", "annealing.temperature"), POSITIVE),
    **dict.fromkeys(
        [f"annealing.{name}" for name in ("temperature_length", "kl_length", "start_kl_weight", "kl_weight")],
        NOT_NEGATIVE,
    ),
    "logit_deviation": POSITIVE,
    "split_every": NOT_NEGATIVE,
    "average": (lambda value: 0 <= value < 1, "0 or more and below 1"),
    "objectives.masked_share": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "model.fusion_layers": SOME,
    "model.start_temperature": (lambda value: 0.001 <= value <= 0.5, "between 0.001 and 0.5"),
    **dict.fromkeys(("model.image_eps", "model.text_eps"), POSITIVE),
    "objectives.itc": NOT_NEGATIVE,
    "objectives.pool": (lambda value: value >= 2, "a whole number of 2 or more: one pair alone has no false one"),
    "objectives.queue": NOT_NEGATIVE,
    **dict.fromkeys(("distillation.itc", "distillation.mlm", "distillation.alpha"), SHARE),
    **dict.fromkeys(("distillation.ramp", "distillation.ramp_samples"), NOT_NEGATIVE),
    "distillation.reach": POSITIVE,
    "head.ranked": SOME,
    "data.batch": SOME,
    "data.image_size": (lambda value: value is None or value >= 1, "a number of pixels of 1 or more"),
    "data.max_length": TOKENS,
    "data.text_length": TOKENS,
    "data.false_pairs": SHARE,
    "data.mask_probability": (lambda value: 0 < value < 1, "above 0 and below 1"),
    "data.crop_scale": SHARES,
    "data.flip": SHARE,
    "data.random_changes": NOT_NEGATIVE,
    "block": NOT_NEGATIVE,
    "data.color_jitter": NOT_NEGATIVE,
    "data.cache_megabytes": NOT_NEGATIVE,
    # Of UniT.
    "model.place_temperature": (lambda value: value > 1, "a number above 1"),
    **dict.fromkeys(("model.place_scale", "model.backbone_eps", "model.num_task_tokens"), NOT_NEGATIVE),
    **dict.fromkeys(("model.decoder_layers", "model.attribute_width"), SOME),
    **dict.fromkeys(("model.backbone_widths", "model.backbone_blocks"), EACH),
    **dict.fromkeys(
        [f"tasks.*.{name}" for name in ("batch", "rows", "of_one_picture", "num_queries", "min_questions")], SOME
    ),
    "tasks.*.ratio": (lambda value: 0 <= value < math.inf, "0 or more"),
    "tasks.*.max_length": TOKENS,
    **dict.fromkeys(("data.short", "data.longest", "data.num_scenes", "measure"), SOME),
    **dict.fromkeys(("data.augmentation.flip", "data.augmentation.crop"), SHARE),
    **dict.fromkeys(("data.augmentation.shorts", "data.augmentation.before_crop"), EACH),
    "data.augmentation.crop_sides": (
        lambda pair: 1 <= pair[0] <= pair[1],
        "two whole numbers of 1 or more, the smaller first",
    ),
    # Of DINO.
    **dict.fromkeys(("model.num_layers", "model.head_width", "model.bottleneck_width", "model.num_prototypes"), SOME),
    "model.drop_path": (lambda value: 0 <= value < 1, "0 or more and below 1"),
    **dict.fromkeys(("crops.global_size", "crops.local_size"), SOME),
    "crops.num_local": NOT_NEGATIVE,
    **dict.fromkeys(("crops.global_scale", "crops.local_scale"), SHARES),
    **dict.fromkeys(("crops.flip", "crops.jitter", "crops.grey"), SHARE),
    **dict.fromkeys(("crops.brightness", "crops.contrast", "crops.saturation", "crops.hue"), NOT_NEGATIVE),
    **dict.fromkeys(("crops.blur", "crops.solarise"), PROBABILITIES),
    **dict.fromkeys(("distillation.momentum", "distillation.center_momentum"), SHARE),
    **dict.fromkeys(("distillation.temperature_warmup", "distillation.freeze_last_layer"), SHARE),
    **dict.fromkeys(("distillation.student_temperature", "distillation.teacher_temperature"), POSITIVE),
    "distillation.first_teacher_temperature": POSITIVE,
    **dict.fromkeys(("objectives.koleo", "objectives.ibot"), NOT_NEGATIVE),
    "optim.lr": NOT_NEGATIVE,
    "optim.eps": POSITIVE,
    "optim.betas": MOMENTA,
    **dict.fromkeys(("optim.weight_decay", "optim.weight_decay_final", "optim.final"), NOT_NEGATIVE),
    **dict.fromkeys([f"optim.groups.*.{name}" for name in ("rate", "weight_decay", "freeze_until")], NOT_NEGATIVE),
    "optim.warmup": NOT_NEGATIVE,
    "optim.clip_norm": POSITIVE,
    "optim.layer_decay": POSITIVE,
    "train.steps": SOME,
    "train.minutes": POSITIVE,
    "train.micro_batch": (lambda value: value == "auto" or value >= 1, 'a whole number of 1 or more, or "auto"'),
    "train.threads": SOME,
    "train.workers": NOT_NEGATIVE,
    "train.save_every": SOME,
    "train.keep_last": SOME,
    "train.keep_every": SOME,
    "train.evaluate_every": SOME,
    "train.log_every": SOME,
    "train.monitor_every": NOT_NEGATIVE,
    "train.patience": SOME,
    "data.held_out": (lambda value: 0 < value < 1, "a share above 0 and below 1"),
    "data.rows": SOME,
    "data.min_questions": SOME,
    "dropout": (lambda value: 0 <= value < 1, "0 or more and below 1"),
    "head.dropout": (lambda value: 0 <= value < 1, "0 or more and below 1"),
    "epochs": POSITIVE,
    "shortlist": NOT_NEGATIVE,
    "init_std": POSITIVE,
    "init_positions": NOT_NEGATIVE,
    "init_blocks": POSITIVE,
    "data.augmentation.jitter": NOT_NEGATIVE,
    "validate": NOT_NEGATIVE,
}


def check(values: Mapping[str, Any]) -> None:
    """Raises TriviumError for the first leaf (by its dotted path) that breaks its rule. None is always allowed."""
    for pattern, (holds, says) in RULES.items():
        for path in those_like(values, pattern):
            value = values[path]
            if value is not None and not holds(value):
                flag = "--" + path.replace("_", "-")
                shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
                raise TriviumError(f"{flag} {shown}: this must be {says}")
    if values.get("optim.weight_decay_final") and not values["optim.weight_decay"]:
        raise TriviumError(
            f"--optim.weight-decay-final {values['optim.weight_decay_final']:g} is reached by a factor, and the decay"
            " begins at 0: give --optim.weight-decay a number above it"
        )


def check_patches(size: int, patch: int, flag: str = "--data.image-size") -> None:
    """Raises TriviumError where a picture of this side does not divide into patches. flag: which sets it."""
    if size % patch:
        near = max(patch, round(size / patch) * patch)
        raise TriviumError(
            f"a picture of {size} pixels cannot be cut into patches of {patch}: choose a multiple, such as {flag}"
            f" {near}"
        )


def check_heads(width: int, num_heads: int, heads: str = "num-heads", of: str = "width") -> None:
    """Raises TriviumError where a width does not divide into heads. heads, of: the fields of the model."""
    if width % num_heads:
        raise TriviumError(
            f"a width of {width} cannot be shared by {num_heads} heads: choose --model.{heads} so that it divides"
            f" --model.{of}"
        )


def check_ranks(scope: str, num_ranks: int, batch: int) -> None:
    """Raises TriviumError where a batch cannot be cut into these ranks, or nothing asks for them."""
    if batch % num_ranks:
        raise TriviumError(
            f"a batch of {batch} cannot be cut into {num_ranks} ranks: choose --objectives.num-ranks so that it divides"
            " --data.batch"
        )
    if (scope == "global") != (num_ranks == 1):
        raise TriviumError(
            f"--objectives.contrastive-scope {scope} with --objectives.num-ranks {num_ranks}: on one rank every scope"
            " is the global one, which ranks do not change, so give both or neither"
        )
