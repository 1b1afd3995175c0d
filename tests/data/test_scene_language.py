"""What is said of scenes, judged anew from words and boxes (scene_facts.py), and how far it can be guessed unseen."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict

import pytest
from scene_guesses import guessed_unseen

from tests.data import scene_facts
from trivium.data.scene_language import (
    LABELS,
    Question,
    Statement,
    captions,
    expressions,
    label_of,
    pair_statements,
    questions,
    stands,
    statements,
)
from trivium.data.scenes import Scene, SceneObject, Scenes

MANY = 400  # scenes; the shares below hold within a few points


@pytest.fixture(scope="module")
def train() -> tuple[Scenes, list[Scene]]:
    scenes = Scenes("train", MANY, seed=1)
    return scenes, [scenes.scene(index) for index in range(MANY)]


@pytest.fixture(scope="module")
def others() -> list[tuple[Scenes, Scene]]:
    """Of every other split, hard and easy, by groups and subgroups."""
    settings = itertools.product(
        ("new-scenes", "held-out-concepts", "held-out-style", "held-out-both"), (0.0, 1.0), ("group", "subgroup")
    )
    made = [Scenes(split, 4, 2, difficulty, classes) for split, difficulty, classes in settings]
    return [(scenes, scenes.scene(index)) for scenes in made for index in range(4)]


def all_scenes(train: tuple[Scenes, list[Scene]], others: list[tuple[Scenes, Scene]]) -> list[tuple[Scenes, Scene]]:
    return [(train[0], scene) for scene in train[1]] + others


def test_every_answer_is_right(train: tuple[Scenes, list[Scene]], others: list[tuple[Scenes, Scene]]) -> None:
    kinds: Counter[str] = Counter()
    for scenes, scene in all_scenes(train, others):
        for question in questions(scene, scenes):
            assert scene_facts.answer(scene, question.text) == question.answer, question
            assert question.text.lower().startswith(question.question_type)
            expected = {"yes": "yes/no", "no": "yes/no"}.get(question.answer, "other")
            assert question.answer_type == ("number" if question.answer.isdigit() else expected)
            kinds[question.question_type] += 1
    assert len(kinds) == 7
    assert min(kinds.values()) > 100


def test_every_statement_has_its_label(train: tuple[Scenes, list[Scene]], others: list[tuple[Scenes, Scene]]) -> None:
    with_statements = 0
    for scenes, scene in all_scenes(train, others):
        found = statements(scene, scenes)
        assert [each.label for each in found] in ([], list(LABELS))
        assert all(scene_facts.label(scene, each.text) == each.label for each in found)
        with_statements += bool(found)
    assert with_statements > 0.4 * MANY


def test_every_expression_fits_one_object(
    train: tuple[Scenes, list[Scene]], others: list[tuple[Scenes, Scene]]
) -> None:
    num_objects, referred = 0, set()
    for scenes, scene in all_scenes(train, others):
        found = expressions(scene, scenes)
        for each in found:
            assert scene_facts.meant(scene, each.text) == [each.object], each
            referred.add((id(scene), each.object))
        assert max(Counter(each.object for each in found).values(), default=0) <= 3
        assert len({each.text for each in found}) == len(found)
        num_objects += len(scene.objects)
    assert len(referred) > 0.75 * num_objects


def test_every_statement_on_two_pictures_holds_of_one_pair(train: tuple[Scenes, list[Scene]]) -> None:
    scenes, made = train
    first_holds = []
    for a, b, c, d in zip(*[iter(made)] * 4, strict=True):
        for text, first, second in pair_statements(((a, b), (c, d)), scenes):
            assert scene_facts.holds(a, b, text) is first, text
            assert scene_facts.holds(c, d, text) is second, text
            assert first != second
            first_holds.append(first)
    assert len(first_holds) > MANY / 2
    assert 0.4 < sum(first_holds) / len(first_holds) < 0.6


def test_captions_name_everything(train: tuple[Scenes, list[Scene]]) -> None:
    scenes, made = train
    for scene in made[:50]:
        names, counts, place = captions(scene, scenes.draws(scene.index))
        assert all(thing.name in names for thing in scene.objects)
        words = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
        told = dict(reversed(part.split(" ", 1)) for part in counts.replace(" and ", ", ").split(", "))
        for phrase, number in told.items():
            assert len(scene_facts.with_noun(scene, phrase)) == words[number]
        assert sum(words[number] for number in told.values()) == len(scene.objects)
        assert any(relation in place for relation in ("left of", "right of", "above", "below", "close to"))


def test_answers_cannot_be_guessed_from_the_question(train: tuple[Scenes, list[Scene]]) -> None:
    scenes, made = train
    by_kind: defaultdict[str, list[Question]] = defaultdict(list)
    for scene in made:
        for question in questions(scene, scenes):
            by_kind[question.question_type].append(question)
    majority = {
        kind: Counter(each.answer for each in asked).most_common(1)[0][1] / len(asked)
        for kind, asked in by_kind.items()
    }
    for kind in ("is there a", "are there", "is the"):
        assert majority[kind] < 0.65, (kind, majority)
    assert majority["how many"] < 0.55
    assert majority["what size is"] < 0.6
    assert majority["what is the"] < 0.25
    assert majority["what color is the"] < 0.4


def test_labels_cannot_be_guessed_from_the_statement(train: tuple[Scenes, list[Scene]]) -> None:
    scenes, made = train
    found: list[Statement] = [each for scene in made for each in statements(scene, scenes)]
    assert set(Counter(each.label for each in found).values()) == {len(found) / 3}
    assert guessed_unseen((each.text, each.label) for each in found) < 0.43


def thing(x: int, y: int, hue: str | None = "red") -> SceneObject:
    return SceneObject("a", 0, hue, "small", (x, y, 20, 20), 400, 0.0, "a", "noto")


def test_what_is_too_close_to_call_is_neither_true_nor_false() -> None:
    assert [stands(thing(0, 0), "left of", thing(x, 0)) for x in (11, 12, 40)] == [None, True, True]
    assert [stands(thing(x, 0), "left of", thing(0, 0)) for x in (11, 12, 40)] == [None, False, False]
    assert stands(thing(0, 0), "above", thing(0, 30)) is True
    assert stands(thing(0, 0), "below", thing(0, 30)) is False
    assert stands(thing(0, 0), "right of", thing(0, 30)) is None
    truths = [(True,), (False, False), (True, False), (True, None), ()]
    assert [label_of(each) for each in truths] == ["entailment", "contradiction", "neutral", None, None]
