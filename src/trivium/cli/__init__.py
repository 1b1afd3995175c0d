"""The command ``trivium``: one verb, one module, imported only when its verb runs.

A verb is a typed function; its parameters are the flags, its docstring is its help (see cli/arguments.py). It returns
None or an exit code and raises TriviumError for a user's mistake; all else that it raises is a mistake of ours.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from trivium.errors import BadSample, TriviumError

OK, OURS, USERS, INTERRUPTED = 0, 1, 2, 130


class Verb(NamedTuple):
    function: str  # module:function
    summary: str  # its line in `trivium --help`, which imports no verb


VERBS = {
    "demo": Verb("trivium.cli.demo:demo", "pretrain a tiny FLAVA on the embedded data and show what it learned"),
    "doctor": Verb("trivium.cli.doctor:doctor", "say what this machine has and what to do about it"),
    "pretrain": Verb("trivium.cli.pretrain:pretrain", "train a recipe on your own pictures, texts and pairs"),
    "finetune": Verb("trivium.cli.finetune:finetune", "fine-tune a trained model for a task: GLUE, VQA, or your own"),
    "evaluate": Verb("trivium.cli.evaluate:evaluate", "measure a model and write a report"),
    "ablate": Verb("trivium.cli.ablate:ablate", "what each part of FLAVA buys: the paper's ablation on your pairs"),
    "compare": Verb("trivium.cli.compare:compare", "lay two runs side by side: settings, curves, results"),
    "ask": Verb("trivium.cli.ask:ask", "answer a question about a picture"),
    "embed": Verb("trivium.cli.embed:embed", "write the embeddings of a folder of pictures to a Parquet file"),
    "search": Verb("trivium.cli.search:search", "find pictures by a text or by another picture"),
    "ground": Verb("trivium.cli.ground:ground", "show where in a picture the words of a text are"),
    "detect": Verb("trivium.cli.detect:detect", "find the objects in a picture and draw their boxes"),
    "data codes": Verb("trivium.cli.data:codes", "cache the image tokenizer's codes of every picture of a run"),
    "data pack": Verb("trivium.cli.data:pack", "write tar shards from any pictures, texts and pairs"),
    "data build pmd": Verb("trivium.cli.data_build:pmd", "build PMD, a subset at a time, from its annotation files"),
    "data build imagenet": Verb("trivium.cli.data_build:imagenet", "write tar shards of ImageNet-1k"),
    "data build text": Verb("trivium.cli.data_build:text", "join running text to sequences of equal length"),
    "data scenes": Verb("trivium.cli.data_scenes:scenes", "write composed pictures with boxes, questions, statements"),
    "data doctor": Verb(
        "trivium.cli.data_doctor:doctor", "say what is wrong with the data of a run, before it is trained"
    ),
    "convert": Verb("trivium.cli.convert:convert", "read and write the layouts of other libraries"),
}

HELP = """\
usage: trivium VERB [arguments]        trivium VERB --help says what a verb takes

Train, evaluate and use small vision-language models: FLAVA and its relatives.

verbs:
{verbs}

examples:
  trivium demo --quick
  trivium pretrain flava --size tiny --data.pairs products.csv --train.minutes 8
  trivium finetune text_classification --init demo --data reviews.csv
  trivium search demo "red mug" --images photos/ --out page.html
  trivium embed demo photos/ --out photos.parquet

exit codes:
  0    done, also when a training run was told to stop and saved
  1    a mistake of ours: a traceback and one sentence
  2    a mistake in the command or the data: one sentence says what and where
  130  interrupted by Ctrl-C
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code. argv: without the program's name; None takes the process's own."""
    words = list(sys.argv[1:] if argv is None else argv)
    _quieten_libraries()
    try:
        with warnings.catch_warnings(), _stated(words, argv is not None):
            _show_warnings_as_sentences()
            code = _run(words) or OK
        sys.stdout.flush()  # here, so that a closed pipe is met inside the try
        return code
    except (TriviumError, BadSample) as error:
        return _fail(str(error), USERS)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough. Python flushes once more at exit: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        refusal = _refusal_of_the_system(error)
        if refusal is not None:
            return _fail(refusal, USERS)
        traceback.print_exc()
        return _fail(f"this is a mistake of ours, please report it with the lines above ({error!r})", OURS)


@contextmanager
def _stated(words: list[str], by_a_script: bool) -> Iterator[None]:
    """Reports, results and passports state the command from sys.argv: a script that calls `main(argv)` has other words
    of its own there."""
    before = sys.argv
    if by_a_script:
        sys.argv = ["trivium", *words]
    try:
        yield
    finally:
        sys.argv = before


def _run(words: list[str]) -> int | None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_page(), end="")
        return OK
    if words[0] in ("-V", "--version"):
        from trivium import __version__

        print(f"trivium {__version__}")
        return OK
    verb, rest = words[0], words[1:]
    while group := [name for name in VERBS if name.startswith(f"{verb} ")]:  # of verbs of several words
        if rest[:1] in ([], ["-h"], ["--help"], ["help"]):
            print(f"trivium {verb} has\n\n{verb_lines(group)}\n\ntrivium {group[0]} --help says what a verb takes")
            return OK
        verb, rest = f"{verb} {rest[0]}", rest[1:]
    function = find_verb(verb)
    from trivium.cli.arguments import parse

    call = parse(function, verb, rest)
    return OK if call is None else call()  # None: help was asked for and printed


def help_page() -> str:
    return HELP.format(verbs=verb_lines(VERBS))


def verb_lines(names: Iterable[str]) -> str:
    width = max(map(len, VERBS))
    return "\n".join(f"  {name:{width}}  {VERBS[name].summary}" for name in names)


def find_verb(name: str) -> Callable[..., int | None]:
    """Import the function behind a verb. Raises TriviumError that names the nearest verb."""
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
        raise TriviumError(f"there is no verb {name}: {hint}")
    module, _, function = VERBS[name].function.partition(":")
    return getattr(importlib.import_module(module), function)


def _refusal_of_the_system(error: Exception) -> str | None:
    """One sentence where the disk or the rights of the user stand in the way, which no code of ours can mend."""
    # Libraries written in Rust state the number of the system's error in their text alone.
    in_text = re.search(r"\bos error (\d+)\b", str(error))
    number = error.errno if isinstance(error, OSError) else int(in_text[1]) if in_text else None
    file = getattr(error, "filename", None)
    where = f"{file}: " if file else ""
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{where}the disk is full or a limit on file size is reached: free some space, or write elsewhere"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}the system does not allow this: check the rights of the file and its folder"
    return None


def _fail(sentence: str, code: int) -> int:
    print(f"trivium: {sentence}", file=sys.stderr)
    return code


def _quieten_libraries() -> None:
    """Keep torch's and transformers' remarks to developers off a user's terminal. What the user set stays."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",  # else it warns at each fork of a worker
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }.items():
        os.environ.setdefault(name, value)


def _show_warnings_as_sentences() -> None:
    """Our own remarks, such as a checkpoint passed over, read like our errors; those of torch are for developers."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"trivium: note: {message}", file=sys.stderr)

    warnings.showwarning = show
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", category=UserWarning, module=r"trivium(\..*)?$")
