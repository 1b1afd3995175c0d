"""`trivium detect`: the objects in a picture, drawn and listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trivium.errors import TriviumError

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # by the end of a file's name, for Pillow


def detect(path: Path, picture: Path, *, out: Path | None = None, score: float = 0.5, task: str | None = None) -> None:
    """Find the objects in a picture: write it with boxes and names, and a JSON file with the same.

      trivium detect runs/unit photo.jpg --out found.png

    The JSON beside the picture (found.json) lists label, score, box (left, top, right, bottom in pixels) and, where the
    model has them, attribute of each object, the surest first. A list from before is replaced with its picture; a
    picture without one, or another file, is not.

    Args:
        path: the model: a run folder, a model folder, or weights of another library.
        picture: the picture.
        out: the picture to write; by default PICTURE-detected.png beside this command.
        score: the least score of an object that is shown.
        task: of a model that detects for several tasks, which; by default the first.
    """
    from trivium.cli.embed import check_can_write, open_model

    out = out or Path(f"{picture.stem}-detected.png")
    if not picture.is_file():
        raise TriviumError(f"{picture}: there is no such picture")
    if out.suffix.lower() not in FORMATS:
        raise TriviumError(f"--out {out}: name a picture to write, such as {out.stem}.png")
    if out.resolve() == picture.resolve():
        raise TriviumError(f"--out {out} is the picture itself, which would be lost: name another")
    if not 0 <= score <= 1:
        raise TriviumError(f"--score {score:g}: it lies between 0 and 1")
    check_can_write(out)
    listed = out.with_suffix(".json")
    before = _list(listed) if listed.exists() else {}
    if before is None:
        raise TriviumError(f"{listed}, where the objects would be listed, holds something else: name another --out")
    if out.exists() and before.get("drawn") != out.name:
        raise TriviumError(
            f"{out} exists already, and no {listed.name} beside it says that it is from here: name another --out"
        )
    from PIL import Image

    from trivium.data.decode import decode
    from trivium.evaluate.detection import drawn
    from trivium.manifest import file_beside, write_whole

    bundle = open_model(path)
    [found] = bundle.detect([picture], task)
    found = found.above(score)
    named, config = bundle.labels_of or {}, bundle.model.config
    tasks = getattr(config, "tasks", ())
    name = task or next((each.name for each in tasks if each.kind == "detection"), "")
    classes, attributes = named.get(name, []), named.get(f"{name}.attributes", [])

    def called(names: list[str], number: int) -> str:
        return names[number] if number < len(names) and names[number] else str(number)

    objects: list[dict[str, Any]] = [
        {
            "label": called(classes, int(found.labels_Q[row])),
            "score": round(float(found.scores_Q[row]), 4),
            "box": [round(x, 2) for x in found.boxes_Q4[row].tolist()],
        }
        | ({} if found.attributes_Q is None else {"attribute": called(attributes, int(found.attributes_Q[row]))})
        for row in range(len(found.scores_Q))
    ]
    page = Image.fromarray(drawn(decode(picture.read_bytes()), found, classes, attributes))
    listing = {"picture": str(picture), "drawn": out.name, "objects": objects}
    found_json = json.dumps(listing, indent=1, ensure_ascii=False) + "\n"
    with file_beside(out) as beside:
        page.save(beside, FORMATS[out.suffix.lower()])
        write_whole(listed, found_json)  # before the picture, which would be taken for another's without it
    for each in objects:
        left, top, right, bottom = each["box"]
        word = f"{each['attribute']} " if "attribute" in each else ""
        print(f"{each['score']:.2f}  {word}{each['label']}  from ({left}, {top}) to ({right}, {bottom})")
    print(f"{len(objects)} objects with a score of {score:g} or more: {out}, {listed}")


def _list(file: Path) -> dict[str, Any] | None:
    """What `detect` wrote into a file; None: it is something else."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.keys() == {"picture", "drawn", "objects"} else None
