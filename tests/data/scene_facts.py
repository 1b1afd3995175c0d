"""Sentences about scenes, read and judged anew: from their words and the boxes alone, by no function of the library."""

from __future__ import annotations

import re
from itertools import product

from trivium.data.scenes import Scene, SceneObject

WORDS = {"one": 1, "two": 2, "three": 3, "four": 4}
RELATION = "(left of|right of|above|below)"


def with_noun(scene: Scene, phrase: str) -> list[SceneObject]:
    """phrase: singular or plural."""
    [number] = [n for n, category in enumerate(scene.categories) if phrase in (category.noun, category.plural)]
    return [thing for thing in scene.objects if thing.category == number]


def lies(first: SceneObject, relation: str, second: SceneObject) -> bool:
    """Only where it is clear: the centres of the boxes are 12 pixels apart."""
    (x, y), (other_x, other_y) = first.centre, second.centre
    ahead = {"left of": other_x - x, "right of": x - other_x, "above": other_y - y, "below": y - other_y}[relation]
    assert abs(ahead) >= 12, "too close to call"
    return ahead > 0


def is_hue(thing: SceneObject, hue: str) -> bool:
    assert thing.hue is not None, "no hue is dominant"
    return thing.hue == hue


def at_the_edge(things: list[SceneObject], extreme: str) -> SceneObject:
    position = {
        "leftmost": lambda thing: thing.centre[0],
        "rightmost": lambda thing: -thing.centre[0],
        "topmost": lambda thing: thing.centre[1],
        "bottommost": lambda thing: -thing.centre[1],
    }[extreme]
    positions = sorted(map(position, things))
    assert len(positions) == 1 or positions[1] - positions[0] >= 12, "too close to call"
    return min(things, key=position)


def alone(things: list[SceneObject]) -> SceneObject:
    [thing] = things
    return thing


def answer(scene: Scene, question: str) -> str:
    """What a question is to be answered with."""
    yes = {True: "yes", False: "no"}
    if match := re.fullmatch(r"Is there an? (\w+) (.+)\?", question):
        things = with_noun(scene, match[2])
        if any(thing.hue == match[1] for thing in things):
            return "yes"
        assert not any(is_hue(thing, match[1]) for thing in things)  # each of them has to be clear
        return "no"
    if match := re.fullmatch(r"Are there more (.+) than (.+)\?", question):
        return yes[len(with_noun(scene, match[1])) > len(with_noun(scene, match[2]))]
    if match := re.fullmatch(f"Is the (.+) {RELATION} the (.+)\\?", question):
        return yes[lies(alone(with_noun(scene, match[1])), match[2], alone(with_noun(scene, match[3])))]
    if match := re.fullmatch(r"How many (.+) are there\?", question):
        return str(len(with_noun(scene, match[1])))
    if match := re.fullmatch(r"What color is the (.+)\?", question):
        return str(alone(with_noun(scene, match[1])).hue)
    if match := re.fullmatch(r"What size is the (.+)\?", question):
        return alone(with_noun(scene, match[1])).size
    match = re.fullmatch(r"What is the (\w+) thing\?", question)
    assert match is not None, question
    if match[1].endswith("most"):
        thing = at_the_edge(list(scene.objects), match[1])
    else:
        thing = alone([thing for thing in scene.objects if is_hue(thing, match[1])])
    return scene.categories[thing.category].noun


def label(scene: Scene, statement: str) -> str:
    """entailment where it holds of all that "the" may mean, contradiction where of none, neutral where of some."""
    if match := re.fullmatch(f"The (.+) is {RELATION} the (.+)\\.", statement):
        pairs = product(with_noun(scene, match[1]), with_noun(scene, match[3]))
        held = [lies(first, match[2], second) for first, second in pairs]
    else:
        match = re.fullmatch(r"The (.+) is (\w+)\.", statement)
        assert match is not None, statement
        things = with_noun(scene, match[1])
        if match[2] in ("small", "medium", "large"):
            held = [thing.size == match[2] for thing in things]
        else:
            held = [is_hue(thing, match[2]) for thing in things]
    assert held, "it speaks of nothing that is there"
    return "entailment" if all(held) else "contradiction" if not any(held) else "neutral"


def meant(scene: Scene, expression: str) -> list[int]:
    """The numbers of the objects that a referring expression fits."""
    number = {id(thing): place for place, thing in enumerate(scene.objects)}
    if match := re.fullmatch(f"the (.+) {RELATION} the (.+)", expression):
        other = alone(with_noun(scene, match[3]))
        return [number[id(thing)] for thing in with_noun(scene, match[1]) if lies(thing, match[2], other)]
    nouns = [category.noun for category in scene.categories]
    words = expression.removeprefix("the ")
    if words in nouns:
        return [number[id(thing)] for thing in with_noun(scene, words)]
    mark, noun = words.split(" ", 1)
    things = with_noun(scene, noun)
    if mark.endswith("most"):
        return [number[id(at_the_edge(things, mark))]]
    if mark in ("small", "medium", "large"):
        return [number[id(thing)] for thing in things if thing.size == mark]
    return [number[id(thing)] for thing in things if is_hue(thing, mark)]


def holds(left: Scene, right: Scene, statement: str) -> bool:
    """Whether a statement on two pictures is true."""

    def counts(phrase: str) -> tuple[int, int]:
        return len(with_noun(left, phrase)), len(with_noun(right, phrase))

    if match := re.fullmatch(r"Each picture shows an? (.+)\.", statement):
        return min(counts(match[1])) > 0
    if match := re.fullmatch(r"Only one of the two pictures shows an? (.+)\.", statement):
        here, there = counts(match[1])
        return (here > 0) + (there > 0) == 1
    if match := re.fullmatch(r"There are more (.+) in the left picture than in the right one\.", statement):
        here, there = counts(match[1])
        return here - there > 0
    match = re.fullmatch(r"There (?:is|are) exactly (\w+) (.+) in the two pictures\.", statement)
    assert match is not None, statement
    return sum(counts(match[2])) == WORDS[match[1]]
