"""What is said of scenes: captions, questions, statements, statements on two pictures, referring expressions.

A predicate of an object is true, false or unclear (None): a hue where no hue is dominant, "left of" where centres lie
nearly below each other. Nothing is asked or said that depends on an unclear one, save in captions.

"The flag is red" with two flags, one of them red, leaves open which is meant. So a statement about "the flag" is
entailed where it holds of all flags, contradicted where it holds of none, and neutral where it holds of some. All three
labels then come from the same sentences, and from the sentence alone nobody can tell them apart.

To keep answers from being guessed, the answer is drawn first, evenly, and then a question that has it; what is denied
("is there a purple dish?") is drawn from what the drawings are like. A two-picture statement is made for two pairs
of pictures, of which it holds of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Literal, TypeVar

import numpy as np

from trivium.data.drawings import Category, cut
from trivium.data.order import Draws
from trivium.data.scenes import Scene, SceneObject, Scenes, random_category, random_drawing, usual_sizes

RELATIONS = ("left of", "right of", "above", "below")
EXTREMES = ("leftmost", "rightmost", "topmost", "bottommost")
MARGIN = 12  # pixels by which centres have to differ
LABELS = ("entailment", "neutral", "contradiction")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
MAX_EXPRESSIONS = 3  # of one object
Label = Literal["entailment", "neutral", "contradiction"]
Truth = bool | None
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    question_type: str  # as VQAv2 has it: how it begins
    answer_type: str  # "yes/no", "number" or "other"


@dataclass(frozen=True)
class Statement:
    text: str
    label: str  # one of LABELS, or "True" and "False" of two pictures


@dataclass(frozen=True)
class Expression:
    text: str
    object: int  # number of the only one that it fits


# ----------------------------------------------------------------------------------------------- predicates


def hue_is(thing: SceneObject, hue: str) -> Truth:
    return None if thing.hue is None else thing.hue == hue


def stands(first: SceneObject, relation: str, second: SceneObject) -> Truth:
    """Whether first is left of (right of, above, below) second; None where it is too close to call."""
    axis = 0 if relation in ("left of", "right of") else 1
    ahead = second.centre[axis] - first.centre[axis]
    if abs(ahead) < MARGIN:
        return None
    return (ahead > 0) == (relation in ("left of", "above"))


def label_of(truths: Sequence[Truth]) -> Label | None:
    """Of a statement about "the" so-and-so: the truth for each that may be meant. None where that is unclear."""
    if not truths or None in truths:
        return None
    return "entailment" if all(truths) else "neutral" if any(truths) else "contradiction"


def things_of(scene: Scene) -> dict[int, list[SceneObject]]:
    """The objects by category, in the order of their numbers."""
    found: dict[int, list[SceneObject]] = {}
    for thing in scene.objects:
        found.setdefault(thing.category, []).append(thing)
    return found


def article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _one(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


# ------------------------------------------------------------------------------------------------- captions


def captions(scene: Scene, draws: Draws) -> list[str]:
    """Three: the names, how many there are of each kind, and how two of them lie to each other."""
    rng = draws.generator("captions")
    order = rng.permutation(len(scene.objects))
    names = _listed([scene.objects[number].name for number in order])
    counts = _listed([_counted(scene.categories[c], len(things)) for c, things in things_of(scene).items()])
    first, second = (scene.objects[number] for number in order[:2])
    relations = [relation for relation in RELATIONS if stands(first, relation, second)]
    there = _one(rng, relations) if relations else "close to"
    return [names, counts, f"{described(scene, first)} {there} {described(scene, second)}"]


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _counted(category: Category, number: int) -> str:
    return f"{NUMBERS[number]} {category.noun if number == 1 else category.plural}"


def described(scene: Scene, thing: SceneObject) -> str:
    noun = scene.categories[thing.category].noun
    return article(" ".join(word for word in (thing.size, thing.hue, noun) if word))


# ------------------------------------------------------------------------------------------------ questions


def questions(scene: Scene, scenes: Scenes) -> list[Question]:
    """At most one of each kind that can be asked: existence, comparison, place, count, color, size, kind."""
    draws = scenes.draws(scene.index)
    made = [
        make(scene, scenes, draws.generator(make.__name__))
        for make in (_existence, _comparison, _place, _count, _color, _size, _kind)
    ]
    return [question for question in made if question is not None]


def _existence(scene: Scene, scenes: Scenes, rng: np.random.Generator) -> Question | None:
    things = things_of(scene)
    if rng.random() < 0.5:
        coloured = [thing for thing in scene.objects if thing.hue is not None]
        if not coloured:
            return None
        thing = _one(rng, coloured)
        hue, category, answer = thing.hue, thing.category, "yes"
    else:
        category = random_category(rng, scenes.split, scenes.classes)
        hue, answer = usual_hue(rng, scenes, category), "no"
        if hue is None or any(hue_is(thing, hue) is not False for thing in things.get(category, ())):
            return None
    noun = scene.categories[category].noun
    return Question(f"Is there {article(f'{hue} {noun}')}?", answer, "is there a", "yes/no")


def usual_hue(rng: np.random.Generator, scenes: Scenes, category: int) -> str | None:
    """The hue of some drawing of a category: what is denied is as likely as what is true."""
    for _ in range(4):
        cutout = cut(random_drawing(rng, scenes.split, scenes.classes, category))
        if cutout is not None and cutout.hue is not None:
            return cutout.hue
    return None


def _comparison(scene: Scene, scenes: Scenes, rng: np.random.Generator) -> Question | None:
    things = things_of(scene)
    unequal = [(a, b) for a, b in permutations(things, 2) if len(things[a]) > len(things[b])]
    if not unequal:
        return None
    more, fewer = (scene.categories[category].plural for category in _one(rng, unequal))
    if rng.random() < 0.5:
        return Question(f"Are there more {more} than {fewer}?", "yes", "are there", "yes/no")
    return Question(f"Are there more {fewer} than {more}?", "no", "are there", "yes/no")


def _place(scene: Scene, scenes: Scenes, rng: np.random.Generator) -> Question | None:
    alone = [things[0] for things in things_of(scene).values() if len(things) == 1]
    asked = rng.random() < 0.5
    found = [
        (first, relation, second)
        for first, second in permutations(alone, 2)
        for relation in RELATIONS
        if stands(first, relation, second) is asked
    ]
    if not found:
        return None
    first, relation, second = _one(rng, found)
    nouns = (scene.categories[thing.category].noun for thing in (first, second))
    text = f"Is the {next(nouns)} {relation} the {next(nouns)}?"
    return Question(text, "yes" if asked else "no", "is the", "yes/no")


def _count(scene: Scene, scenes: Scenes, rng: np.random.Generator) -> Question | None:
    things = things_of(scene)
    number = _one(rng, sorted({len(found) for found in things.values()} | {0}))
    if number == 0:
        absent = [category for category in range(len(scene.categories)) if category not in things]
        category = _one(rng, absent)
    else:
        category = _one(rng, [category for category, found in things.items() if len(found) == number])
    return Question(f"How many {scene.categories[category].plural} are there?", str(number), "how many", "number")


def _color(scene: Scene, scenes: Scenes, rng: np.random.Generator) -> Question | None:
    alone = [things[0] for things in things_of(scene).values() if len(things) == 1 and things[0].hue is not None]
    if not alone:
        return None
    thing = _one(rng, alone)
    noun, hue = scene.categories[thing.category].noun, thing.hue
    assert hue is not None
    return Question(f"What color is the {noun}?", hue, "what color is the", "other")


def _size(scene: Scene, scenes: Scenes, rng: np.random.Generator) -> Question | None:
    alone = [things[0] for things in things_of(scene).values() if len(things) == 1]
    if not alone:
        return None
    thing = _one(rng, alone)
    return Question(f"What size is the {scene.categories[thing.category].noun}?", thing.size, "what size is", "other")


def _kind(scene: Scene, scenes: Scenes, rng: np.random.Generator) -> Question | None:
    marks: list[tuple[str | None, SceneObject | None]] = [
        (extreme, outermost(scene.objects, extreme)) for extreme in EXTREMES
    ]
    hues = [thing.hue for thing in scene.objects]
    if None not in hues:
        marks += [(thing.hue, thing) for thing in scene.objects if hues.count(thing.hue) == 1]
    found = [(mark, thing) for mark, thing in marks if mark is not None and thing is not None]
    if not found:
        return None
    mark, thing = _one(rng, found)
    return Question(f"What is the {mark} thing?", scene.categories[thing.category].noun, "what is the", "other")


def outermost(things: Iterable[SceneObject], extreme: str) -> SceneObject | None:
    """The leftmost (rightmost, topmost, bottommost) of several; None where two are too close to call."""
    axis, sign = (0 if extreme in ("leftmost", "rightmost") else 1), (1 if extreme in ("leftmost", "topmost") else -1)
    first, *others = sorted(things, key=lambda thing: sign * thing.centre[axis])
    if not others or abs(others[0].centre[axis] - first.centre[axis]) < MARGIN:
        return None
    return first


# ----------------------------------------------------------------------------------------------- statements


def statements(scene: Scene, scenes: Scenes) -> list[Statement]:
    """One of each label, about hue, size or place, or none at all where the scene does not give all three."""
    rng = scenes.draws(scene.index).generator("statements")
    usual = {category: usual_hue(rng, scenes, category) for category in things_of(scene)}
    found: dict[str, dict[str, list[str]]] = {label: {} for label in LABELS}
    for kind, text, label in _candidates(scene, usual, usual_sizes(scenes.difficulty)):
        found[label].setdefault(kind, []).append(text)
    if not all(found.values()):
        return []
    return [Statement(_one(rng, _one(rng, list(found[label].values()))), label) for label in LABELS]


def _candidates(scene: Scene, usual: dict[int, str | None], sizes: Sequence[str]) -> Iterable[tuple[str, str, Label]]:
    """(kind, sentence, label). usual: of each category a hue that it often has, for what is contradicted."""
    things = things_of(scene)
    for category, found in things.items():
        noun = scene.categories[category].noun
        hues = {thing.hue for thing in found} | {usual[category]}
        for hue in sorted(hue for hue in hues if hue is not None):
            if label := label_of([hue_is(thing, hue) for thing in found]):
                yield "hue", f"The {noun} is {hue}.", label
        for size in sizes:
            if label := label_of([thing.size == size for thing in found]):
                yield "size", f"The {noun} is {size}.", label
    for first, second in permutations(things, 2):
        nouns = scene.categories[first].noun, scene.categories[second].noun
        for relation in RELATIONS:
            if label := label_of([stands(a, relation, b) for a in things[first] for b in things[second]]):
                yield "place", f"The {nouns[0]} is {relation} the {nouns[1]}.", label


# ------------------------------------------------------------------------------------- referring expressions


def expressions(scene: Scene, scenes: Scenes) -> list[Expression]:
    """Up to three of each object, by hue, size and place, each of which fits no other object."""
    rng = scenes.draws(scene.index).generator("expressions")
    things = things_of(scene)
    found: list[Expression] = []
    for number, thing in enumerate(scene.objects):
        texts = list(_fitting(scene, thing, things))
        chosen = rng.permutation(len(texts))[:MAX_EXPRESSIONS]
        found += [Expression(texts[place], number) for place in sorted(chosen)]
    return found


def _fitting(scene: Scene, thing: SceneObject, things: dict[int, list[SceneObject]]) -> Iterable[str]:
    noun = scene.categories[thing.category].noun
    alike = [each for each in things[thing.category] if each is not thing]
    if not alike:
        yield f"the {noun}"
    if thing.hue is not None and all(hue_is(each, thing.hue) is False for each in alike):
        yield f"the {thing.hue} {noun}"
    if all(each.size != thing.size for each in alike):
        yield f"the {thing.size} {noun}"
    for extreme in EXTREMES:
        if alike and outermost([thing, *alike], extreme) is thing:
            yield f"the {extreme} {noun}"
    for category, others in things.items():
        if category == thing.category or len(others) > 1:
            continue
        for relation in RELATIONS:
            if stands(thing, relation, others[0]) and all(stands(each, relation, others[0]) is False for each in alike):
                yield f"the {noun} {relation} the {scene.categories[category].noun}"


# -------------------------------------------------------------------------------- statements on two pictures

Pair = tuple[Scene, Scene]


def pair_statements(pairs: tuple[Pair, Pair], scenes: Scenes) -> list[tuple[str, bool, bool]]:
    """At most one of each kind: (sentence, whether it holds of the first pair, of the second), always of one alone."""
    rng = scenes.draws(pairs[0][0].index).generator("pair statements")
    kinds: dict[str, list[tuple[str, bool, bool]]] = {}
    for number, category in enumerate(scenes.categories):
        counts = [[sum(thing.category == number for thing in scene.objects) for scene in pair] for pair in pairs]
        for kind, text, holds in _pair_candidates(category):
            first, second = (holds(left, right) for left, right in counts)
            if first != second:
                kinds.setdefault(kind, []).append((text, first, second))
    return [_one(rng, found) for found in kinds.values()]


def _pair_candidates(category: Category) -> Iterable[tuple[str, str, Callable[[int, int], bool]]]:
    """(kind, sentence, whether it holds of a left and a right picture, told how many of the category each shows)."""
    one, many = article(category.noun), category.plural
    yield "each", f"Each picture shows {one}.", lambda left, right: left > 0 and right > 0
    yield "one", f"Only one of the two pictures shows {one}.", lambda left, right: (left > 0) != (right > 0)
    yield "more", f"There are more {many} in the left picture than in the right one.", lambda left, right: left > right
    for total in range(1, 5):
        counted = f"is exactly one {category.noun}" if total == 1 else f"are exactly {NUMBERS[total]} {many}"
        yield "total", f"There {counted} in the two pictures.", partial(_add_up_to, total)


def _add_up_to(total: int, left: int, right: int) -> bool:
    return left + right == total
