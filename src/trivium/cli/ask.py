"""`trivium ask`: a question about a picture, and the likeliest answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from trivium.errors import TriviumError


def ask(
    path: Path,
    *,
    image: Path,
    question: str,
    second_image: Path | None = None,
    k: Annotated[int, arg(aliases=["-k"])] = 5,
    answers: Path | None = None,
    freely: bool = False,
    ranked: Annotated[int | None, arg(metavar="N")] = None,
    first_word_twice: bool = False,
    task: str | None = None,
) -> None:
    """Print the likeliest answers to a question about a picture, best first, each with its probability.

      trivium ask runs/vqa --image kitchen.jpg --question "what is on the table?" -k 3

    Args:
        path: a model that was fine-tuned for questions, or for statements about pictures, or a UniT that learned
            them: a run folder, a model folder, or ALBEF's official vqa.pth, with its answer_list.json and vocab.txt
            beside it.
        image: the picture.
        question: the question, or the statement that is judged.
        second_image: of a model that reads two pictures.
        k: how many answers.
        answers: a file with a list of answers to choose from, a line each or a JSON list, instead of the model's own;
            for a model that writes its answers, as ALBEF does.
        freely: let such a model write in any words.
        ranked: of the list, so many answers are read to their end, those that begin most likely; by default as the
            model has it (128).
        first_word_twice: rank the list as ALBEF's public code does, which counts an answer's first word twice.
        task: of a UniT that learned several such tasks, the name of one; questions are meant where it is left out.
    """
    if answers is not None and freely:
        raise TriviumError("--answers is a list to choose from, and --freely chooses from none: give one of them")
    ranks_otherwise = ranked is not None or first_word_twice
    if ranks_otherwise and freely:
        raise TriviumError("--freely chooses from no list: leave out --ranked and --first-word-twice, which rank one")
    for file in (image, second_image):
        if file is not None and not file.is_file():
            raise TriviumError(f"{file}: there is no such picture")
    from trivium.load import load

    bundle = load(path)
    if ranks_otherwise:
        bundle = bundle.ranking(ranked, first_word_twice or None)
        if answers is None and not bundle.labels:
            raise TriviumError(f"{path} came without a list of answers to rank: name one with --answers")
    found = bundle.ask(
        image, question, k, second_picture=second_image, answers=None if answers is None else read_list(answers),
        freely=freely, task=task,
    )  # fmt: skip
    for answer in found:
        print(f"{answer.probability:7.4f}  {answer.text}")


def read_list(file: Path) -> list[str]:
    """Answers, a line each or as a JSON list. Raises TriviumError."""
    from trivium.data.records import json_elements, lines

    if file.suffix == ".json":
        given = [record.fields for record in json_elements(str(file))]
    else:
        given = [line[1].strip() if isinstance(line, tuple) else None for line in lines(str(file))]
    for number, answer in enumerate(given):
        if not isinstance(answer, str) or not answer.strip():
            raise TriviumError(f"{file} (entry {number}) is no answer: each must be a text")
    if len(given) < 2:
        raise TriviumError(f"{file} holds {len(given)} answers: two at least are needed to choose from")
    return given
