"""The names of the classes of UniT's tasks, in the order of its released files."""

from __future__ import annotations

from trivium.models.unit import UnitConfig

_COCO = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, , stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, , backpack, umbrella, , ,
handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
surfboard, tennis racket, bottle, , wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, , dining table, , , toilet, , tv,
laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, , book, clock, vase,
scissors, teddy bear, hair drier, toothbrush
"""
LABELS = {  # by number; "" where a data set has no such category
    "coco": ["", *(name.strip() for name in _COCO.split(","))],
    "snli_ve": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "mnli": ["entailment", "neutral", "contradiction"],
    "sst2": ["negative", "positive"],
    "qqp": ["not_duplicate", "duplicate"],
}


def labels_of(config: UnitConfig) -> dict[str, list[str]]:
    """The names of classes, of each task whose files do not leave them to a list of their own (answers of VQA, the
    categories of Visual Genome)."""
    sizes = {task.name: task.num_labels for task in config.tasks}
    return {name: names for name, names in LABELS.items() if sizes.get(name) == len(names)}
