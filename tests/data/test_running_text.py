"""Documents joined to sequences, against a plain form that tokenizes every candidate whole."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from trivium.data import embedded
from trivium.data.running_text import pack_text
from trivium.data.sources import open_source
from trivium.data.tokenizer import Tokenizer
from trivium.errors import TriviumError


@pytest.fixture(scope="module")
def bert() -> Tokenizer:
    return Tokenizer.wordpiece(embedded.bert_vocabulary())


def by_brute_force(documents: list[list[str]], tokenizer: Tokenizer, max_length: int) -> list[str]:
    """Each step asks whether the whole candidate still fits, by its true tokens."""

    def fits(text: str) -> bool:
        return len(tokenizer.encode([text], 10**6)[0]) <= max_length

    rows = [""]
    for document in filter(None, documents):
        whole = " ".join(document)
        if fits(whole):
            joined = f"{rows[-1]} {tokenizer.sep_token} {whole}" if rows[-1] else whole
            rows[-1:] = [joined] if fits(joined) else [rows[-1], whole]
            continue
        between = f" {tokenizer.sep_token} "
        for word in document:
            joined = f"{rows[-1]}{between}{word}" if rows[-1] else word
            rows[-1:] = [joined] if fits(joined) else [rows[-1], word]
            between = " "
    return [row for row in rows if row]


def packed(files: list[Path], out: Path, tokenizer: Tokenizer, max_length: int) -> list[str]:
    pack_text([str(file) for file in files], out, tokenizer, max_length)
    return pq.read_table(out)["text"].to_pylist()


WORDS = st.sampled_from(["a", "dog", "unbelievably", "Größe", "don't", "東京", "https://example.org/x-1", "\u200b"])


@given(documents=st.lists(st.lists(WORDS, max_size=40), min_size=1, max_size=12), max_length=st.integers(14, 40))
def test_sequences_are_those_of_the_plain_form(
    bert: Tokenizer, tmp_path_factory: pytest.TempPathFactory, documents: list[list[str]], max_length: int
) -> None:
    folder = tmp_path_factory.mktemp("text")
    if not any(documents):
        return
    table, plain = folder / "a.parquet", folder / "a.txt"
    pq.write_table(pa.table({"text": [" ".join(words) or None for words in documents]}), table)
    plain.write_text("\n \n".join("\n".join(words) for words in documents) + "\n")
    expected = by_brute_force(documents, bert, max_length)
    assert packed([table], folder / "out.parquet", bert, max_length) == expected
    assert packed([plain], folder / "out.parquet", bert, max_length) == expected
    assert max(len(ids) for ids in bert.encode(expected, 10**6)) <= max_length


def learned(pre_tokenizer: Any, alphabet: list[str]) -> Tokenizer:
    """Byte pairs of other vocabularies than BERT's, in which a word and the same word after a blank differ."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizer
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=350, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["a dog unbelievably don't dog", "a dog 's unbelievably big dog"], trainer)
    return Tokenizer(made)


VOCABULARIES = {
    "bytes": learned(pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel.alphabet()),
    "bytes_with_a_blank_before": learned(pre_tokenizers.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()),
    "sentencepiece": learned(pre_tokenizers.Metaspace(), []),
}


@pytest.mark.parametrize("name", VOCABULARIES)
@given(documents=st.lists(st.lists(WORDS | st.just("'s"), max_size=40), max_size=12), max_length=st.integers(28, 60))
def test_a_blank_that_belongs_to_a_word_is_counted_with_it(
    name: str, documents: list[list[str]], max_length: int
) -> None:
    tokenizer = VOCABULARIES[name]
    if any(documents):
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder, "a.parquet")
            pq.write_table(pa.table({"text": [" ".join(words) or None for words in documents]}), table)
            expected = by_brute_force(documents, tokenizer, max_length)
            assert packed([table], Path(folder, "out.parquet"), tokenizer, max_length) == expected
            assert max(len(ids) for ids in tokenizer.encode(expected, 10**6)) <= max_length


def test_512_tokens_whole_documents_and_the_separator(bert: Tokenizer, tmp_path: Path) -> None:
    """Each word is one token: two documents of 300 do not share a sequence, 300 and 209 do, 1,500 are cut."""
    sizes = [300, 300, 209, 1500, 5]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": " ".join(["dog"] * size)}) + "\n" for size in sizes))
    rows = packed([tmp_path / "a.jsonl"], tmp_path / "a.parquet", bert, 512)
    ids = bert.encode(rows, 10**6)
    assert [[len(part.split()) for part in row.split("[SEP]")] for row in rows] == [
        [300], [300, 209], [510], [510], [480, 5]
    ]  # fmt: skip
    assert [row.count(bert.sep_id) for row in ids] == [1, 2, 1, 1, 2]
    assert [len(row) for row in ids] == [302, 512, 512, 512, 488]
    source = open_source("text", [tmp_path / "a.parquet"])
    assert [source.read(row, row)["text"] for row in range(len(source))] == rows


def test_a_word_longer_than_a_sequence_is_halved(bert: Tokenizer, tmp_path: Path) -> None:
    word = "-".join("abcdefgh")  # fifteen tokens
    (tmp_path / "a.txt").write_text(f"one {word} two\n")
    rows = packed([tmp_path / "a.txt"], tmp_path / "a.parquet", bert, 12)
    assert "".join(rows).replace(" ", "") == f"one{word}two"
    assert max(map(len, bert.encode(rows, 10**6))) <= 12


def test_what_cannot_be_used_is_said_and_counts_are_true(bert: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one two\nthree\n\n\n\xff\nfour\n")
    (tmp_path / "b.jsonl").write_text('{"text": "five"}\n{"title": 3}\n{\n{"title": "six"}\n')
    out = tmp_path / "o.parquet"
    done = pack_text([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], out, bert, 32)
    assert (done.documents, done.words, done.rows) == (4, 6, 1)
    assert pq.read_table(out)["text"].to_pylist() == ["one two three [SEP] four [SEP] five [SEP] six"]
    assert done.skipped == [
        f"{tmp_path / 'a.txt'} (line 5): it is not UTF-8",
        f'{tmp_path / "b.jsonl"} (line 2): its "caption|captions|text|title" holds no text',
        f"{tmp_path / 'b.jsonl'} (line 3): it is no JSON object",
    ]
    stated = json.loads((tmp_path / "o.parquet.json").read_text())
    assert (stated["documents"], sorted(stated["given"])) == (4, [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")])
    (tmp_path / "c.txt").write_text("\n \n")
    with pytest.raises(TriviumError, match=r"there is no text in .*c.txt"):
        pack_text([str(tmp_path / "c.txt")], tmp_path / "c.parquet", bert, 32)
    assert not (tmp_path / "c.parquet").exists()
