"""The command itself: help, exit codes, sentences. Verbs have tests of their own."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from trivium import cli
from trivium.cli import VERBS, Verb, main
from trivium.errors import BadSample, TriviumError


def python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)


def test_help_names_every_verb_and_loads_no_torch() -> None:
    done = python(
        "import sys; from trivium.cli import main; code = main(['--help'])\n"
        "heavy = {'torch', 'numpy', 'tyro', 'rich', 'transformers'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr); sys.exit(code)"
    )
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"
    for name, verb in VERBS.items():
        assert f"  {name} " in done.stdout
        assert verb.summary in done.stdout
    for code in ("0 ", "1 ", "2 ", "130"):
        assert f"\n  {code}" in done.stdout
    assert all(len(line) <= 100 for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_is_where_the_table_says_and_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    captured = capsys.readouterr()
    assert f"trivium {name}" in captured.out
    assert captured.err == ""
    for ragged in ("{None}", "default: None", "default: )", "[STR ["):
        assert ragged not in captured.out


@pytest.mark.parametrize("name", VERBS)
def test_the_help_of_a_verb_loads_no_torch(name: str) -> None:
    words = [*name.split(), "--help"]
    done = python(f"import sys; from trivium.cli import main; main({words}); sys.exit('torch' in sys.modules)")
    assert done.returncode == 0


def test_python_dash_m_and_no_words_print_the_page() -> None:
    done = subprocess.run([sys.executable, "-m", "trivium"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == cli.help_page()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["serch"], "there is no verb serch: did you mean search?"),
        (["xyzzy"], "there is no verb xyzzy: there are demo, doctor, "),
        (["embed", "a", "b", "--ot", "c"], "trivium embed has no option --ot: did you mean --out?"),
        (["embed", "a", "b", "--ot=c"], "trivium embed has no option --ot: did you mean --out?"),
        (["embed", "a", "b", "--out", "c", "--qqqq"], "trivium embed has no option --qqqq: see trivium embed --help"),
        (["embed"], "trivium embed needs PATH and FOLDER and --out PATH: see trivium embed --help"),
        (["embed", "a", "b"], "trivium embed needs --out PATH: see trivium embed --help"),
        (["embed", "a", "b", "c", "--out", "d"], "trivium embed has no use for 'c': see trivium embed --help"),
        (["search", "m", "x", "--images", "i", "-k", "few"], "Error parsing -k/--k: invalid literal for int()"),
    ],
)
def test_a_wrong_command_is_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith(f"trivium: {sentence}")


@pytest.fixture
def run_verb(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a function as the verb `try`."""

    def run(function: Callable[..., object], *words: str) -> int:
        monkeypatch.setattr(sys.modules[__name__], "verb_under_test", function, raising=False)
        monkeypatch.setitem(VERBS, "try", Verb(f"{__name__}:verb_under_test", "for a test"))
        return main(["try", *words])

    monkeypatch.setattr(importlib, "import_module", lambda name: sys.modules[name])
    return run


def raising(error: BaseException) -> Callable[[], None]:
    def verb() -> None:
        raise error

    return verb


@pytest.mark.parametrize(
    ("error", "code", "last_line", "has_traceback"),
    [
        (TriviumError("data.csv, line 7: no picture"), 2, "trivium: data.csv, line 7: no picture", False),
        (BadSample("a.png", "", "it is empty"), 2, "trivium: a.png: it is empty", False),
        (KeyboardInterrupt(), 130, "trivium: interrupted", False),
        (OSError(28, "No space left on device", "x.bin"), 2, "trivium: x.bin: the disk is full", False),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "trivium: the disk is full", False),
        (PermissionError(13, "Permission denied", "x.bin"), 2, "trivium: x.bin: the system does not", False),
        (KeyError("mim"), 1, "trivium: this is a mistake of ours", True),
        (AssertionError("12 is not 13"), 1, "trivium: this is a mistake of ours", True),
        (FileNotFoundError(2, "No such file", "x.bin"), 1, "trivium: this is a mistake of ours", True),
    ],
)
def test_exit_codes(error, code, last_line, has_traceback, run_verb, capsys) -> None:
    assert run_verb(raising(error)) == code
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith(last_line)
    assert ("Traceback" in err) == has_traceback
    assert has_traceback or len(err.splitlines()) == 1


def test_a_verb_may_say_its_exit_code(run_verb) -> None:
    assert run_verb(lambda: None) == 0
    assert run_verb(lambda: 130) == 130


def test_ctrl_c_in_a_real_process(tmp_path: Path) -> None:
    started = tmp_path / "started"
    code = (
        "import sys, time, pathlib; from trivium import cli\n"
        f"def verb() -> None: pathlib.Path({str(started)!r}).touch(); time.sleep(60)\n"
        "cli.find_verb = lambda name: verb\n"
        "sys.exit(cli.main(['try']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # what a shell starts with & ignores it
    )
    while not started.exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130
    assert err == "trivium: interrupted\n"


def test_a_closed_pipe_is_no_error() -> None:
    code = (
        "import sys; from trivium import cli\n"
        "def verb() -> None:\n    for _ in range(100_000): print('a line that nobody reads')\n"
        "cli.find_verb = lambda name: verb\n"
        "sys.exit(cli.main(['try']))"
    )
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    os.read(reading, 100)
    os.close(reading)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0
    assert err == ""


def test_our_own_remarks_are_sentences_and_those_of_torch_are_not_shown() -> None:
    code = (
        "import sys, warnings; from trivium import cli\n"
        "def verb() -> None:\n"
        "    warnings.warn_explicit('step 20 is damaged', UserWarning, 'load.py', 1, module='trivium.load')\n"
        "    warnings.warn_explicit('a new API', UserWarning, 'x.py', 1, module='torch.nn')\n"
        "cli.find_verb = lambda name: verb\n"
        "sys.exit(cli.main(['try']))"
    )
    done = python(code)
    assert done.returncode == 0
    assert done.stderr == "trivium: note: step 20 is damaged\n"
