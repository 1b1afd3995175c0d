"""Scenes written out: `OUT/coco`, `OUT/vqa` and so on, each as its owners publish it, pictures and annotations.

Scenes are made in runs of RUN. The rows of a finished run are kept in a hidden folder of its format until all are
there; then the annotation files are written, and last `scenes-train.json` or `scenes-val.json`: the settings, and the
checksums of the annotations. So whoever starts again goes on where it stopped, and gets the same bytes.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from trivium.data.scene_formats import FIRST_ID, FORMATS, SET_SIZE, Format, Half, Rows, half_of, text_of
from trivium.data.scenes import Scene, Scenes
from trivium.errors import TriviumError
from trivium.manifest import digest_of, file_beside, make_folder, sha256

RUN = 200  # scenes; whole sets of NLVR2
QUALITY = 95  # of JPEGs, colours at full resolution
LAYOUT = 1  # of all that is written: another number is another setting
ATTRIBUTION = "ATTRIBUTION.txt"  # who drew, and under which licences


@dataclass(frozen=True)
class Written:
    """One format after a call."""

    folder: Path
    made: int  # scenes that this call made; 0 where all was there
    annotations: dict[str, int]  # rows by their name


def write_scenes(
    scenes: Scenes,
    out: Path,
    formats: Sequence[str] = tuple(FORMATS),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Written]:
    """Write scenes into the folder `out`, one folder for each format. What is complete stays as it is.

    progress: called with the scenes done and all of them.

    Raises:
        TriviumError: a folder holds something else, or scenes of other settings; too few scenes for a pair of pairs.
    """
    half = half_of(scenes)
    for name in formats:
        if name not in FORMATS:
            raise TriviumError(f"there is no format {name!r}: choose one of {', '.join(FORMATS)}, or all")
    if "nlvr2" in formats and scenes.count < SET_SIZE:
        raise TriviumError(
            f"{scenes.count} scenes are too few for nlvr2, whose sentences need {SET_SIZE}: ask for more"
        )
    folders = {name: _Folder(name, FORMATS[name], out / name, half, scenes) for name in formats}
    for folder in folders.values():
        folder.claim()
    runs = range(-(-scenes.count // RUN))
    made = dict.fromkeys(formats, 0)
    for run in runs:
        missing = [folder for folder in folders.values() if not folder.has(run)]
        if missing:
            indices = range(scenes.count)[run * RUN : (run + 1) * RUN]
            _write_run(run, [scenes.scene(index) for index in indices], missing)
            for folder in missing:
                made[folder.name] += len(indices)
        if progress is not None:
            progress(min((run + 1) * RUN, scenes.count), scenes.count)
    return {name: Written(out / name, made[name], folder.finish(runs)) for name, folder in folders.items()}


@dataclass
class _Folder:
    """The folder of one format, and what is done in it."""

    name: str
    format: Format
    path: Path
    half: Half
    scenes: Scenes
    complete: bool = False

    @property
    def mark(self) -> Path:
        """Written last; states what there is."""
        return self.path / f"scenes-{self.half}.json"

    @property
    def under_way(self) -> Path:
        return self.path / f".scenes-{self.half}"

    def claim(self) -> None:
        """Make the folder ours, and see whether all is there. Raises TriviumError where it is something else."""
        settings = {"layout": LAYOUT, **asdict(self.scenes)}
        stated = self.under_way / "settings.json"
        before = _read(self.mark) if self.mark.exists() else _read(stated) if stated.exists() else None
        if before is not None:
            there = before.get("settings", {})
            differing = next((name for name in settings if there.get(name) != settings[name]), None)
            if differing is not None:
                raise TriviumError(
                    f"{self.path} holds scenes of its {self.half} half made with {differing} = {there.get(differing)},"
                    f" not {settings[differing]}: name a new folder, or remove this one"
                )
        elif self.path.exists() and not _is_ours(self.path):
            raise TriviumError(f"{self.path} exists already and holds other things: name a new folder")
        if self.mark.exists() and before is not None:
            self.complete = self._is_whole(before)
            if self.complete:
                return
            self.mark.unlink()
        make_folder(self.path)
        make_folder(self.under_way)
        _write(stated, json.dumps({"settings": settings}))

    def _is_whole(self, mark: dict[str, Any]) -> bool:
        """Whether every file has its length and every picture is there."""
        files = [(self.path / name, facts["bytes"]) for name, facts in mark["files"].items()]
        return all(file.is_file() and file.stat().st_size == size for file, size in files) and all(
            self.picture(index).is_file() for index in range(self.scenes.count)
        )

    def picture(self, index: int) -> Path:
        return self.path / self.format.picture(self.half, FIRST_ID[self.half] + index)

    def has(self, run: int) -> bool:
        return self.complete or self._run_path(run).exists()

    def keep(self, run: int, made: Sequence[Scene]) -> None:
        _write(self._run_path(run), json.dumps(self.format.rows(self.half, self.scenes, made), ensure_ascii=False))

    def finish(self, runs: range) -> dict[str, int]:
        """Write the annotations and, last, the mark. Returns how many rows there are by name."""
        if self.complete:
            return _read(self.mark)["annotations"]
        rows: Rows = {}
        for run in runs:
            for name, entries in _read(self._run_path(run)).items():
                rows.setdefault(name, []).extend(entries)
        contents = self.format.files(self.half, self.scenes, rows)
        paths = {name: self.path / name for name in contents}
        for name, content in contents.items():
            paths[name].parent.mkdir(parents=True, exist_ok=True)
            _write(paths[name], text_of(content, self.format.lines))
        _write(self.path / ATTRIBUTION, Path(__file__).with_name("attribution.txt").read_text(encoding="utf-8"))
        files = {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in paths.items()}
        counts = {name: len(entries) for name, entries in rows.items()}
        mark = {
            "settings": {"layout": LAYOUT, **asdict(self.scenes)},
            "annotations": counts,
            "files": files,
            "sha256": digest_of(files),
        }
        _write(self.mark, json.dumps(mark, indent=1) + "\n")
        shutil.rmtree(self.under_way)
        return counts

    def _run_path(self, run: int) -> Path:
        return self.under_way / f"{run:06d}.json"


def _write_run(run: int, made: Sequence[Scene], folders: Sequence[_Folder]) -> None:
    """Pictures, then the rows; the rows are there only when the pictures are on the disk."""
    written: list[Path] = []
    for scene in made:
        first: dict[str, Path] = {}  # the file of each encoding; other formats link to it
        for folder in folders:
            path = folder.picture(scene.index)
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f".{path.name}")
            beside.unlink(missing_ok=True)
            suffix = folder.format.suffix
            if suffix in first:
                _link(first[suffix], beside)
            else:
                beside.write_bytes(encoded(scene, suffix))
                first[suffix] = path
                written.append(path)
            beside.replace(path)
    for path in written:  # together, which is much faster than one by one
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for folder in folders:
        folder.keep(run, made)


def encoded(scene: Scene, suffix: str) -> bytes:
    """The picture as a JPEG or a PNG."""
    buffer = io.BytesIO()
    picture = Image.fromarray(scene.pixels_HWC)
    if suffix == "png":
        picture.save(buffer, "PNG", compress_level=6)
    else:
        picture.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


def _link(there: Path, here: Path) -> None:
    try:
        here.hardlink_to(there)
    except OSError:  # a file system without links
        shutil.copyfile(there, here)


def _is_ours(folder: Path) -> bool:
    """Empty, or with scenes of the other half."""
    return folder.is_dir() and (
        not any(folder.iterdir()) or any(folder.glob("scenes-*.json")) or any(folder.glob(".scenes-*"))
    )


def _write(path: Path, text: str) -> None:
    with file_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    content = None
    with suppress(ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise TriviumError(f"{path} is damaged: remove it, or the whole folder, and write the scenes again")
    return content
