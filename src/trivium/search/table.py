"""Embeddings of many files as one Parquet table: file, sha256, embedding (unit length), error.

The table's metadata says which model made it, so that rows of two models never meet in one search.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trivium.bundle import Bundle
from trivium.bundle.hashes import model_hash
from trivium.errors import TriviumError
from trivium.manifest import file_beside

METADATA = b"trivium"


@dataclass(frozen=True)
class Row:
    file: str  # relative to the table's folder; a line of a text file is "file:line"
    sha256: str  # of the bytes of the picture, or of the line
    embedding: np.ndarray | None  # float32 [D], length 1; None where there is an error
    error: str | None = None


@dataclass(frozen=True)
class Table:
    model: str  # see `fingerprint`
    folder: str  # that the files lie in, or the text file of the lines; absolute
    rows: list[Row]

    def found(self) -> tuple[list[str], np.ndarray]:
        """Names and embeddings [N, D] of the rows that have one."""
        good = [(row.file, row.embedding) for row in self.rows if row.embedding is not None]
        return [file for file, _ in good], np.stack([embedding for _, embedding in good])

    def write(self, path: Path) -> None:
        """Whole or not at all: an old table stays until the new one is on the disk."""
        width = next(len(row.embedding) for row in self.rows if row.embedding is not None)
        absent = np.array([row.embedding is None for row in self.rows])
        values = [np.zeros(width, np.float32) if row.embedding is None else row.embedding for row in self.rows]
        columns = {
            "file": pa.array([row.file for row in self.rows], pa.string()),
            "sha256": pa.array([row.sha256 for row in self.rows], pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(np.concatenate(values), pa.float32()), width, mask=pa.array(absent)
            ),
            "error": pa.array([row.error for row in self.rows], pa.string()),
        }
        metadata = json.dumps({"model": self.model, "folder": self.folder})
        table = pa.table(columns).replace_schema_metadata({METADATA: metadata})
        try:
            with file_beside(path) as beside:
                pq.write_table(table, beside)
        except OSError as error:
            error.filename = str(path)  # pyarrow does not say which file it was
            raise

    @classmethod
    def read(cls, path: Path) -> Table:
        """Raises TriviumError for a file that is missing, no Parquet, or not written by `trivium embed`."""
        if not path.is_file():
            raise TriviumError(f"{path}: there is no such file; `trivium embed` writes one")
        try:
            table = pq.read_table(path)
            about = json.loads(table.schema.metadata[METADATA])
            embeddings = table["embedding"].combine_chunks()
            vectors_ND = np.asarray(embeddings.flatten(), np.float32).reshape(-1, embeddings.type.list_size)
            vectors = iter(vectors_ND)  # of the rows that have one: null rows are left out of the flat values
            rows = [
                Row(file, sha256, next(vectors) if error is None else None, error)
                for file, sha256, error in zip(
                    *(table[column].to_pylist() for column in ("file", "sha256", "error")), strict=True
                )
            ]
            return cls(about["model"], about["folder"], rows)
        except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError, AttributeError):
            raise TriviumError(f"{path}: not a table of embeddings that `trivium embed` wrote") from None


def fingerprint(bundle: Bundle) -> str:
    """A name for exactly this model, tokenizer and image transform: another wherever the embeddings may be."""
    return f"{bundle.family}-{model_hash(bundle)[:16]}"
