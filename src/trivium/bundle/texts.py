"""What of one text a model reads, for a person who asks with it."""

from __future__ import annotations

import warnings

from trivium.data.tokenizer import UNREAD, Tokenizer
from trivium.errors import TriviumError

ANY_LENGTH = 2**30  # tokens


def check_read(text: str, tokenizer: Tokenizer, max_length: int, what: str) -> None:
    """Warn where a text is cut to `max_length` tokens. what: how the sentence calls the text.

    Raises:
        TriviumError: nothing of it is read, as of marks alone where the vocabulary leaves out marks.
    """
    if not tokenizer.reads(text):
        raise TriviumError(f'the {what} "{text}" {UNREAD}: use words')
    words = tokenizer.words(text, ANY_LENGTH)
    last = max((end for _, _, end in tokenizer.words(text, max_length)), default=0)
    read = sum(end <= last for _, _, end in words)
    if read < len(words):
        warnings.warn(
            f"the {what} is longer than the {max_length} tokens that this model reads: its first {read} of"
            f" {len(words)} words and marks are read, the others are not",
            stacklevel=3,
        )
