"""The kinds of failure that a user can meet and mend."""

from __future__ import annotations

# How gloo, NCCL and the store begin to say that another process is gone, or gives no answer.
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "wait timeout after",
    "NCCL communicator was aborted",
    "ncclRemoteError",
)


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


class UnreadableNow(BadSample):
    """A file that the disk or the network does not give, though it is there: another time it may."""


def lost_process(error: RuntimeError) -> TriviumError | None:
    """What to tell the user where `error` says that another process of the run has ended; else None.

    torch may raise the end of a data worker from a signal handler, anywhere in the main thread, so whoever runs the
    steps asks here, not the loader alone.
    """
    text = str(error)
    if "DataLoader worker" in text and ("killed by signal" in text or "exited unexpectedly" in text):
        return TriviumError(
            f"a worker that reads the data ended unexpectedly ({text}): most often memory ran out; try fewer workers or"
            " a smaller micro-batch, and go on with --resume"
        )
    if any(sign in text for sign in LOST_PEER):
        return TriviumError(
            f"another process of this run ended, or its machine is out of reach ({text.splitlines()[0]}): its own"
            " message says why; start all of them again with --resume"
        )
    return None
