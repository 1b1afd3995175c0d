"""The two kinds of failure that a user can meet and mend."""

from __future__ import annotations


class TriviumError(ValueError):
    """A user's mistake: one sentence that says what is wrong, where (file, line, sample) and what to do.

    The command line prints the sentence alone and exits with code 2. A broken invariant of our own is an
    ``assert``, never this.
    """


class BadSample(Exception):
    """One sample that cannot be used: a picture that does not decode, a text that is empty.

    A source raises it; the loader replaces the sample, logs it and counts it (see ``data/loader.py``).
    """

    def __init__(self, file: str, where: str, why: str) -> None:
        super().__init__(f"{file} ({where}): {why}" if where else f"{file}: {why}")
        self.file = file  # path of the file, or of the shard
        self.where = where  # line, row or member inside it; "" where the file is the sample
        self.why = why

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str, str]]:
        return BadSample, (self.file, self.where, self.why)
