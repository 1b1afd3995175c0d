"""`trivium finetune retrieval` from end to end: the official files and one's own, three families, and mistakes."""

from __future__ import annotations

import html
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import trivium
from tests.cli.test_finetune import figures
from tests.data.drawn import drawn_picture
from tests.recipes.shop import checkpoint, digests, lines_of
from tests.recipes.shop import trivium as run
from trivium.bundle import Bundle
from trivium.data.tokenizer import BERT_SPECIALS, Tokenizer
from trivium.data.transforms import ImageTransform
from trivium.evaluate import results
from trivium.invariance import albef, clip, flava
from trivium.recipes.retrieval import RETRIEVAL
from trivium.recipes.retrieval_data import RetrievalData, open_splits
from trivium.train.config import set_leaves
from trivium.train.optim import build

WORDS = [*BERT_SPECIALS, "a", "picture", "of", "number", "one", "two", "three", "four", "five", "six", "seven", "eight"]
QUICK = {
    "data.batch": 6, "data.image-size": 32, "train.steps": 4, "train.evaluate-every": 2, "train.workers": 0,
    "train.threads": 1, "train.precision": "fp32", "train.log-every": 1, "optim.lr": 0.003,
}  # fmt: skip


def saved(folder: Path, family: str) -> Path:
    model: torch.nn.Module
    tokenizer = Tokenizer.wordpiece(WORDS)
    if family == "albef":
        model = albef.random_albef(replace(albef.TINY, vocab_size=len(WORDS)), dtype=torch.float32)
        tokenizer = tokenizer.for_captions()
    elif family == "flava":
        model = flava.random_flava(replace(flava.TINY, vocab_size=len(WORDS)), dtype=torch.float32)
    else:
        config = replace(clip.TINY, vocab_size=len(WORDS), end_id=tokenizer.sep_id)
        model = clip.random_clip(config, dtype=torch.float32)
    Bundle(family, model, tokenizer, ImageTransform(size=32), max_length=16).save(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: saved(folder / family, family) for family in ("albef", "flava", "clip")}


@pytest.fixture(scope="module")
def flickr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Flickr30K as ALBEF's files have it: one caption an entry in training, a list of them to be measured on."""
    root = tmp_path_factory.mktemp("flickr30k")
    (root / "flickr30k-images").mkdir()
    for n in range(8):
        (root / "flickr30k-images" / f"{n}.png").write_bytes(drawn_picture(n))
    caption = [f"A picture of number {word}." for word in WORDS[9:]]
    train = [
        {"image": f"flickr30k-images/{n}.png", "caption": f"{caption[n]} {more}", "image_id": n}
        for n in range(8) for more in ("a picture", "one")
    ]  # fmt: skip
    held = [{"image": f"flickr30k-images/{n}.png", "caption": [caption[n], f"number {n}"]} for n in range(4)]
    for split, entries in (("train", train), ("val", held), ("test", held[:3])):
        (root / f"flickr30k_{split}.json").write_text(json.dumps(entries))
    return root


@pytest.mark.parametrize(("family", "decays"), [("albef", {"model.temperature": 0.02}), ("flava", {}), ("clip", {})])
def test_the_temperature_alone_of_all_vectors_is_decayed_as_published(
    models: dict[str, Path], flickr: Path, family: str, decays: dict[str, float]
) -> None:
    values = {name.replace("-", "_"): value for name, value in QUICK.items()}
    values |= {"init": str(models[family]), "data.root": str(flickr)}
    task = "retrieval_flickr30k"
    prepared_run = set_leaves(RETRIEVAL[task], values).prepare("finetune", {"task": task}).run
    names = {parameter: name for name, parameter in prepared_run.method.named_parameters()}
    found = {
        names[parameter]: group["full_decay"]
        for group in build(prepared_run.method, prepared_run.optim).param_groups
        for parameter in group["params"]
        if parameter.ndim < 2 and group["full_decay"]
    }
    assert found == decays


def tune(task: str, init: Path, out: Path, *words: object, **changes: object) -> dict[str, float]:
    named = {**QUICK, **{name.replace("__", "."): value for name, value in changes.items()}}
    flags = [word for name, value in named.items() for word in (f"--{name}", str(value))]
    assert run("finetune", task, "--init", init, "--out", out, *flags, *words) == 0
    return figures(out)


def test_the_official_files_train_albef_and_both_orders_are_measured(
    models: dict[str, Path], flickr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    found = tune("retrieval_flickr30k", models["albef"], out, "--data", flickr)
    for split, pictures in (("dev", 4), ("test", 3)):
        for way, queries in (("tr", pictures), ("ir", 2 * pictures)):
            for order in ("", "_reranked"):
                name = f"Flickr30K retrieval.{split}.{way}{order}_r1"
                assert json.loads((out / "results.json").read_text())["results"][name]["n"] == queries
    start, *rest = lines_of(out / "metrics.jsonl")
    assert start["step"] == 0, "what it began with is measured, and never chosen"
    told = capsys.readouterr().err
    value = start["results"]["figures"]["dev.recall_reranked"]
    assert f"{value:.4g} before training" in told or f"before training ({value:.4g})" in told
    measured = [entry["results"]["figures"] for entry in rest if "results" in entry]
    names = [f"dev.{way}_reranked_r{cutoff}" for way in ("tr", "ir") for cutoff in (1, 5, 10)]
    assert measured[0]["dev.recall_reranked"] == pytest.approx(np.mean([measured[0][name] for name in names]))
    best = max(measured, key=lambda figures: figures["dev.recall_reranked"])
    assert found["Flickr30K retrieval.dev.tr_reranked_r1"] == best["dev.tr_reranked_r1"]
    assert found["Flickr30K retrieval.dev.ir_r1"] == best["dev.ir_r1"]
    assert {"itc", "itm"} == set(rest[0]["losses"])
    before, after = trivium.load(models["albef"]).model.state_dict(), trivium.load(out).model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "itm_head.weight" in moved and "fusion.blocks.0.cross_attention.query.weight" in moved
    assert not any(name.startswith("mlm_head.") for name in moved)
    state = load_file(checkpoint(out, 4) / "training" / "method.safetensors")
    assert len(state["image_queue"]) == 16 // 4  # a quarter of the pairs
    assert trivium.load(out).tuned_for == ("Flickr30K retrieval",)  # which a suite asks for
    assert trivium.load(models["albef"]).tuned_for == ()
    capsys.readouterr()
    assert run("evaluate", out) == 0
    assert "test, re-ranked by matching: R@1 / 5 / 10 of texts" in capsys.readouterr().out
    again = {name: value for name, value in figures(out).items() if not name.startswith("seconds.")}
    assert again == pytest.approx({name: found[name] for name in found if not name.startswith("seconds.")}, abs=1e-9)


@pytest.mark.parametrize("begins", ["flickr30k", "coco"])
def test_karpathys_list_gives_what_albefs_lists_give(begins: str, tmp_path: Path) -> None:
    """Training has a row for each caption, his restval is trained on too, and a held-out picture has all captions."""
    splits = ["train", "restval", "val", "test"] if begins == "coco" else ["train", "train", "val", "test"]
    images = []
    for n, split in enumerate(splits):
        folder = ("train2014" if split == "train" else "val2014") if begins == "coco" else "flickr30k-images"
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{n}.jpg").write_bytes(drawn_picture(n))
        sentences = [{"raw": f"picture {n}, caption {k}", "tokens": []} for k in range(6)]
        images.append({"filename": f"{n}.jpg", "split": split, "sentences": sentences})
        if begins == "coco":
            images[-1]["filepath"] = folder
    (tmp_path / f"dataset_{begins}.json").write_text(json.dumps({"images": images}))

    def rows(data: RetrievalData) -> dict[str, list[tuple[object, ...]]]:
        title, sources = open_splits(data, f"retrieval_{begins}")
        assert title == {"flickr30k": "Flickr30K retrieval", "coco": "COCO retrieval"}[begins]
        read = {split: [source.read(row, row) for row in range(len(source))] for split, source in sources.items()}
        return {
            split: [(each["image"], each["same_image"], each.get("text"), each.get("texts")) for each in samples]
            for split, samples in read.items()
        }

    data = RetrievalData(root=str(tmp_path))
    found = rows(data)
    for split, parts in (("train", splits[:2]), ("val", ["val"]), ("test", ["test"])):
        entries = []
        for image in (each for each in images if each["split"] in parts):
            path = f"{image.get('filepath', 'flickr30k-images')}/{image['filename']}"
            texts = [each["raw"] for each in image["sentences"]]
            entries += [{"image": path, "caption": c} for c in (texts if split == "train" else [texts])]
        (tmp_path / f"{begins}_{split}.json").write_text(json.dumps(entries))
    own = rows(data)
    assert {split: len(each) for split, each in found.items()} == {"train": 12, "dev": 1, "test": 1}
    for split in own:
        assert [(image, *texts) for image, _, *texts in found[split]] == [(i, *texts) for i, _, *texts in own[split]]
    assert len({number for _, number, *_ in found["train"]}) == 2, "rows of one picture share its number"


def test_a_head_that_nothing_trains_chooses_no_checkpoint(
    models: dict[str, Path], flickr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init, out = tmp_path / "contrastive", tmp_path / "run"
    replace(trivium.load(models["flava"]), fusion_trained=False).save(init)
    found = tune("retrieval_flickr30k", init, out, "--data", flickr, objectives__itm=0)
    assert not any("reranked" in name for name in found)
    measured = [line["results"]["figures"] for line in lines_of(out / "metrics.jsonl")[1:] if "results" in line]
    best = max(measured, key=lambda figures: figures["dev.recall"])
    assert found["Flickr30K retrieval.dev.ir_r1"] == best["dev.ir_r1"]
    assert "dev: re-ranking by matching: no loss has trained what" in capsys.readouterr().out
    again = tune("retrieval_flickr30k", init, tmp_path / "matching", "--data", flickr)
    assert "Flickr30K retrieval.dev.tr_reranked_r1" in again, "this run trains it"


@pytest.mark.parametrize("family", ["albef", "clip"])
def test_what_each_query_finds_is_written_and_gives_the_figures(
    models: dict[str, Path], flickr: Path, tmp_path: Path, family: str
) -> None:
    out = tmp_path / "run"
    found = tune("retrieval_flickr30k", models[family], out, "--data", flickr)
    orders = {"": "", "reranked_": "_reranked"} if family == "albef" else {"": ""}
    for split, pictures in (("dev", 4), ("test", 3)):
        folder = out / "predictions" / split
        texts, images = (lines_of(folder / f"{way}.jsonl") for way in ("image_to_text", "text_to_image"))
        assert (len(texts), len(images)) == (pictures, 2 * pictures)
        assert images[1]["caption"] == "number 0" and images[1]["label"] == texts[0]["row"]
        for way, lines in (("tr", texts), ("ir", images)):
            for order, suffix in orders.items():
                ranks = [line[f"{order}rank"] for line in lines]
                assert np.mean(np.array(ranks) == 1) == pytest.approx(
                    found[f"Flickr30K retrieval.{split}.{way}{suffix}_r1"]
                )
                for line in lines:
                    right = line.get("label", f"{line['row']}, caption ")  # a picture's captions begin so
                    place = next(n for n, each in enumerate(line[f"{order}found"]) if each.startswith(right))
                    assert place < line[f"{order}rank"], "others of the same score count before it"
                    assert place == line[f"{order}rank"] - 1 or family == "albef"
                    assert len(line[f"{order}found"]) == (2 * pictures if way == "tr" else pictures)
        assert ("reranked_found" in texts[0]) == (family == "albef")


def test_the_suite_fine_tunes_too_and_takes_no_measured_picture_for_a_training_row(
    models: dict[str, Path], flickr: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    published = RETRIEVAL["retrieval_flickr30k"]
    short = replace(published, epochs=1.0, data=replace(published.data, batch=4, image_size=32))
    monkeypatch.setitem(RETRIEVAL, "retrieval_flickr30k", short)
    out = tmp_path / "out"
    words = ("--suite", "albef", "--task", "Flickr30K retrieval", "--data.root", flickr, "--out", out, "--fine-tune")
    assert run("evaluate", models["clip"], *words, "--device", "cpu") == 0
    [tuned] = (out / "fine-tuned").glob("retrieval_flickr30k-*")
    assert lines_of(tuned / "metrics.jsonl")[-1]["step"] == 4
    name = "Flickr30K retrieval.test.tr_r1"
    assert figures(out)[name] == figures(tuned)[name]
    assert json.loads((tuned / "config.json").read_text())["values"]["data.rows"] == 5000, "of dev and of test"
    assert "training rows" not in (out / "report.html").read_text(encoding="utf-8")
    assert run("evaluate", models["clip"], *words, "--rows", 2, "--device", "cpu") == 0
    [few] = [each for each in (out / "fine-tuned").iterdir() if each != tuned]
    assert json.loads((few / "config.json").read_text())["values"]["data.rows"] == 2
    assert lines_of(few / "metrics.jsonl")[-1]["step"] == 4, "of what is measured"
    page = html.unescape((out / "report.html").read_text(encoding="utf-8"))
    assert "learned from all of its training rows: --rows caps what is measured of it alone" in page


def test_a_run_that_is_resumed_ends_as_one_that_was_not(models: dict[str, Path], flickr: Path, tmp_path: Path) -> None:
    words = ("--data", flickr, "--train.save-every", 2, "--train.keep-last", 9, "--distillation.ramp", 2)
    tune("retrieval_flickr30k", models["albef"], tmp_path / "straight", *words)
    out = tmp_path / "again"
    tune("retrieval_flickr30k", models["albef"], out, *words)
    (checkpoint(out, 4) / "manifest.json").unlink()  # as if it had not come to be
    assert run("finetune", out, "--resume") == 0
    assert digests(checkpoint(out, 4)) == digests(checkpoint(tmp_path / "straight", 4))


def test_of_two_data_sets_in_one_folder_the_task_takes_its_own(
    models: dict[str, Path], flickr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "both"
    shutil.copytree(flickr, root)
    for split, entries in (("train", 6), ("val", 2)):
        rows = json.loads((flickr / f"flickr30k_{split}.json").read_text())[:entries]
        (root / f"coco_{split}.json").write_text(json.dumps(rows))
    found = tune("retrieval_coco", models["albef"], tmp_path / "coco", "--data", root, objectives__pool=6)
    assert {name.partition(".")[0] for name in found if "retrieval" in name} == {"COCO retrieval"}
    assert results.read(tmp_path / "coco" / "results.json")["COCO retrieval.dev.tr_r1"].n == 2
    assert run("finetune", "retrieval", "--init", models["albef"], "--out", tmp_path / "no", "--data", root) == 2
    assert "fine-tune on retrieval_flickr30k or on retrieval_coco" in capsys.readouterr().err


def test_larger_pictures_have_positions_of_their_own_also_in_the_official_layout(
    models: dict[str, Path], flickr: Path, tmp_path: Path
) -> None:
    out, back = tmp_path / "run", tmp_path / "back"
    tune("retrieval_flickr30k", models["albef"], out, "--data", flickr, **{"data.image-size": 64})
    tuned = trivium.load(out)
    assert tuned.transform.size == tuned.model.config.image_size == 64
    assert tuned.model.image.positions.shape[1] == 1 + (64 // albef.TINY.patch_size) ** 2
    assert run("convert", out, "--to", "albef-retrieval", "--out", back) == 0
    picture = [drawn_picture(1)]
    mine, theirs = (bundle.encode_image(picture).projected for bundle in (tuned, trivium.load(back)))
    torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-6)


def test_distillation_is_a_switch(models: dict[str, Path], flickr: Path, tmp_path: Path) -> None:
    words = ("--data", flickr, "--distillation.ramp", 1, "--shortlist", 0)
    weights = {}
    for alpha in (0.0, 0.4):
        out = tmp_path / str(alpha)
        found = tune("retrieval_flickr30k", models["albef"], out, *words, distillation__alpha=alpha)
        assert not any("reranked" in name for name in found)
        first, *_, last = (entry for entry in lines_of(out / "metrics.jsonl") if "losses" in entry)
        assert first["stats"]["itc_kl"] == pytest.approx(first["losses"]["itc"])
        taught = last["losses"]["itc"] - last["stats"]["itc_kl"]  # the entropy of what the teacher says
        assert taught > 0.1 if alpha else taught == pytest.approx(0, abs=1e-5)
        weights[alpha] = (first["losses"]["itc"], last["losses"]["itc"])
    assert weights[0.0][0] == weights[0.4][0]  # the ramp begins at 0
    assert weights[0.0][1] != weights[0.4][1]


@pytest.mark.parametrize(
    ("family", "losses", "said", "unused"),
    [
        ("flava", {"contrastive", "itm"}, "without distillation", {"queue"}),
        ("clip", {"contrastive"}, "CLIP matches nothing", {"queue", "pool"}),
    ],
)
def test_other_families_train_what_they_have_on_tables_of_ones_own(
    family: str, losses: set[str], said: str, unused: set[str], models: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A Parquet with the pictures in it and a list of captions for each."""
    names = WORDS[9:]
    rows = {"image": [drawn_picture(n) for n in range(8)],
            "captions": [[f"a picture of number {name}", f"number {name}"] for name in names]}  # fmt: skip
    pq.write_table(pa.table(rows), tmp_path / "pairs.parquet")
    table, out = tmp_path / "pairs.parquet", tmp_path / "run"
    words = ("--data", table, "--data.dev", table, "--data.text-column", "captions")
    found = tune("retrieval", models[family], out, *words, objectives__pool=6, objectives__queue=12)
    assert set(lines_of(out / "metrics.jsonl")[1]["losses"]) == losses
    told = capsys.readouterr().err
    assert said in told
    assert set(re.findall(r"objectives\.(\w+) has no effect", told)) == unused
    assert ("retrieval.dev.tr_reranked_r1" in found) == (family == "flava")
    assert results.read(out / "results.json")["retrieval.dev.ir_r10"].n == 16
    assert 0 <= found["retrieval.dev.ir_r1"] <= found["retrieval.dev.ir_r10"] <= 1


@pytest.mark.parametrize(
    ("task", "words", "sentence"),
    [
        ("retrieval", [], "no captioned pictures are given: name a table or a folder with --data.train"),
        ("retrieval", ["--data.train", "TABLE"], "name some with --data.dev"),
        ("retrieval_coco", ["--data", "EMPTY"], "holds no coco_train.json: give"),
        ("retrieval_coco", ["--data", "ROOT"], "no coco_train.json, but there are files for retrieval_flickr30k"),
        ("retrieval", ["--data", "EMPTY"], "holds no flickr30k_train.json and no coco_train.json"),
        ("retrieval_flickr30k", ["--data", "ROOT", "--select-on", "dev.accuracy"], "use one of dev.recall_reranked"),
        ("retrieval_flickr30k", ["--data", "ROOT", "--data.image-size", "30"], "--data.image-size 32"),
        ("retrieval_flickr30k", ["--data", "ROOT", "--objectives.pool", "4"], "cut pools of 4 in two"),
        ("retrieval_flickr30k", ["--data", "ROOT", "--train.micro-batch", "1"], "one pair holds no false one for ITM"),
        ("retrieval_flickr30k", ["--data", "ROOT", "--objectives.contrastive", "0", "--objectives.itm", "0"],
         "every loss has weight 0"),
        ("retrieval_flickr30k", ["--data", "ROOT", "--distillation.alpha", "1.5"], "--distillation.alpha 1.5"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_and_nothing_is_half_written(
    task: str, words: list[str], sentence: str, models: dict[str, Path], flickr: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = {"ROOT": flickr, "EMPTY": tmp_path, "TABLE": flickr / "flickr30k_train.json"}
    given = [str(places.get(word, word)) for word in words]
    flags = [word for name, value in QUICK.items() for word in (f"--{name}", str(value)) if f"--{name}" not in words]
    code = run("finetune", task, "--init", models["albef"], "--out", tmp_path / "run", *flags, *given)
    told = capsys.readouterr()
    assert code == 2 and sentence in told.err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_model_that_matches_nothing_needs_no_false_pair_in_a_micro_batch(
    models: dict[str, Path], flickr: Path, tmp_path: Path
) -> None:
    found = tune("retrieval_flickr30k", models["clip"], tmp_path / "run", "--data", flickr, "--train.micro-batch", 1)
    assert "Flickr30K retrieval.dev.tr_r1" in found


def test_entries_that_cannot_be_used_are_named_and_too_many_stop_the_run(
    models: dict[str, Path], flickr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "flickr30k-images").symlink_to(flickr / "flickr30k-images")
    for split in ("train", "val"):
        entries = json.loads((flickr / f"flickr30k_{split}.json").read_text())
        entries[1:3] = [{"image": "flickr30k-images/0.png"}, {"image": "9.png", "caption": "a"}]
        (tmp_path / f"flickr30k_{split}.json").write_text(json.dumps(entries))
    words = ("--data", tmp_path, "--shortlist", 0, "--data.max-length", 7)
    tune("retrieval_flickr30k", models["albef"], tmp_path / "run", *words, "--train.bad-rate", 1)
    told, err = capsys.readouterr()
    assert "train: 7 captions have more than 7 tokens and are cut there; the first: " in err
    assert "flickr30k_train.json (entry 0)" in err and "dev: " not in err
    assert "flickr30k_val.json (entry 1): it has no" in told and "(entry 2): its picture" in told
    skipped = " ".join(str(line) for line in lines_of(tmp_path / "run" / "skipped.jsonl"))
    assert "flickr30k_train.json (entry 1)" in skipped or "flickr30k_train.json (entry 2)" in skipped
    more = {**QUICK, "train.steps": 40, "train.bad-window": 10, "train.evaluate-every": 40}
    flags = [word for name, value in more.items() for word in (f"--{name}", str(value))]
    out = tmp_path / "stopped"
    code = run("finetune", "retrieval_flickr30k", "--init", models["albef"], "--out", out, *flags, *words)
    assert code == 2 and "flickr30k_train.json" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "stopped" / "results.json").exists()


def test_a_model_without_a_shared_space_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trivium.invariance.finetune import random_bert

    model = random_bert(dtype=torch.float32)
    Bundle("bert", model, Tokenizer.wordpiece(WORDS), ImageTransform()).save(tmp_path / "bert")
    assert run("finetune", "retrieval", "--init", tmp_path / "bert") == 2
    assert "a model of the family bert has no space that both share" in capsys.readouterr().err
