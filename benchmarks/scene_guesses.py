"""How far answers about scenes can be guessed by whoever sees only the words.

    python benchmarks/scene_guesses.py      # half a minute

The commonest answer to each sentence, counted on one half of the scenes and tried on the other; of a sentence that is
new there, the commonest of all. Writes results/scene_guesses.json.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable

import side_by_side

from trivium.data.scene_language import pair_statements, questions, statements
from trivium.data.scenes import Scenes

Told = tuple[str, str]  # a sentence, and the answer to it


def guessed_unseen(told: Iterable[Told]) -> float:
    """Share of the second half that is guessed from the first, every other row being of it."""
    rows = list(told)
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for text, answer in rows[::2]:
        counts[text][answer] += 1
        counts[""][answer] += 1
    guesses = [(counts.get(text) or counts[""]).most_common(1)[0][0] == answer for text, answer in rows[1::2]]
    return sum(guesses) / len(guesses)


def told_of(scenes: Scenes, count: int) -> dict[str, list[Told]]:
    """By what is asked. Of a statement on two pictures, which holds of one of two pairs, whether it is the first."""
    made = [scenes.scene(index) for index in range(count)]
    found: defaultdict[str, list[Told]] = defaultdict(list)
    for scene in made:
        for question in questions(scene, scenes):
            for kind in (question.question_type, "questions of all kinds"):
                found[kind].append((question.text, question.answer))
        found["statements"] += [(each.text, each.label) for each in statements(scene, scenes)]
    for a, b, c, d in zip(*[iter(made)] * 4, strict=False):
        for text, first, _ in pair_statements(((a, b), (c, d)), scenes):
            found["statements on two pictures"].append((text, str(first)))
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=1200)
    arguments = parser.parse_args()
    told = told_of(Scenes("train", arguments.scenes), arguments.scenes)
    results = {kind: {"guessed": guessed_unseen(rows), "rows": len(rows)} for kind, rows in sorted(told.items())}
    for kind, row in results.items():
        print(f"{kind}: {row['guessed']:.2f} of {row['rows']:,}")
    side_by_side.write("scene_guesses", results)


if __name__ == "__main__":
    main()
