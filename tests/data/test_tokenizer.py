"""Tokenizers: BERT's behaviour to the id, learned vocabularies that repeat, files of other languages."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import re
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tests.byte_pairs import PAIRS, openai_file
from trivium.data.embedded import bert_vocabulary
from trivium.data.tokenizer import BERT_SPECIALS, Tokenizer
from trivium.errors import TriviumError

CAPTIONS = [
    "A red mug on a wooden table .",
    "Two dogs are running through the snow.",
    "The lighthouse's lamp, unlit (at noon)!",
    "a café in München serves naïve crêpes",
    "dogs running, mugs standing, tables turning",
    "snow on the wooden lighthouse",
] * 3
GERMAN = ["Ein roter Becher auf dem Holztisch", "Zwei Hunde laufen durch den Schnee", "Straßenbahn in München"] * 4
JAPANESE = ["木のテーブルの上の赤いマグカップ", "二匹の犬が雪の中を走っている", "海辺の灯台と青い空"] * 4


@pytest.fixture(scope="module")
def vocabulary() -> list[str]:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789.,!?()'-\"çñüöß木赤い")
    words = ["red", "mug", "dog", "the", "on", "wooden", "light", "##house", "##s", "##ing", "run", "##n", "table"]
    pieces = [*BERT_SPECIALS, *words, *letters, *(f"##{letter}" for letter in letters if letter.isalnum())]
    return list(dict.fromkeys(pieces))


def reference(vocabulary: list[str], folder: Path, lowercase: bool) -> object:
    from transformers import BertTokenizerFast

    file = folder / "vocab.txt"
    file.write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return BertTokenizerFast(vocab=str(file), do_lower_case=lowercase)


HARD = [
    *CAPTIONS,
    *JAPANESE,
    "",
    "   ",
    "unwanted\u200brunning\tred\nmug\x00dog\ufffd",
    "RED Mug-DOG's ÇA ÑU Üöß",
    "[MASK] red [SEP] mug",
    "x" * 101,
    "e\u0301 \u1e9e 🐕‍🦺 ２３",
]


@pytest.mark.parametrize("lowercase", [True, False])
def test_word_pieces_are_berts(vocabulary: list[str], tmp_path: Path, lowercase: bool) -> None:
    bert = reference(vocabulary, tmp_path, lowercase)
    ours = Tokenizer.wordpiece(vocabulary, lowercase)
    for max_length in (512, 6):
        theirs = bert(HARD, max_length=max_length, truncation=True)["input_ids"]  # type: ignore[operator]
        assert ours.encode(HARD, max_length) == theirs


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_word_pieces_are_berts_on_any_text(
    text: str, vocabulary: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    if not hasattr(test_word_pieces_are_berts_on_any_text, "bert"):
        bert = reference(vocabulary, tmp_path_factory.mktemp("bert"), True)
        test_word_pieces_are_berts_on_any_text.bert = bert  # type: ignore[attr-defined]
    bert = test_word_pieces_are_berts_on_any_text.bert  # type: ignore[attr-defined]
    assert Tokenizer.wordpiece(vocabulary).encode([text], 512) == bert([text])["input_ids"]


def test_a_cut_text_keeps_its_ends(vocabulary: list[str]) -> None:
    tokenizer = Tokenizer.wordpiece(vocabulary)
    [ids] = tokenizer.encode(["red mug on the wooden table"], max_length=4)
    assert ids == [tokenizer.cls_id, vocabulary.index("red"), vocabulary.index("mug"), tokenizer.sep_id]
    assert tokenizer.encode(["red"], max_length=2) == [[tokenizer.cls_id, tokenizer.sep_id]]


def test_padding(vocabulary: list[str]) -> None:
    tokenizer = Tokenizer.wordpiece(vocabulary)
    ids_BT, mask_BT = tokenizer.pad([[2, 7, 3], [2, 3]])
    assert ids_BT.tolist() == [[2, 7, 3], [2, 3, tokenizer.pad_id]]
    assert mask_BT.tolist() == [[True, True, True], [True, True, False]]
    assert (ids_BT.dtype, mask_BT.dtype) == (torch.int64, torch.bool)
    assert tokenizer.pad([[2, 3]], length=5)[0].shape == (1, 5)


def test_decode_leaves_special_tokens_out(vocabulary: list[str]) -> None:
    tokenizer = Tokenizer.wordpiece(vocabulary)
    [ids] = tokenizer.encode(["red lighthouse"], 10)
    assert tokenizer.decode(ids) == tokenizer.decode(torch.tensor(ids)) == "red lighthouse"


def test_roles_and_what_continues_a_word(vocabulary: list[str]) -> None:
    tokenizer = Tokenizer.wordpiece(vocabulary)
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (
        0,
        1,
        2,
        3,
        4,
    )
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    assert tokenizer.vocab_size == len(vocabulary)
    assert tokenizer.continues.tolist() == [piece.startswith("##") for piece in vocabulary]


@pytest.mark.parametrize(
    ("pieces", "message"),
    [(["a", "b", "a"], "'a' twice"), (["[PAD]", "[UNK]", "a"], r"lacks \[CLS\], \[SEP\], \[MASK\]")],
)
def test_a_wrong_vocabulary(pieces: list[str], message: str) -> None:
    with pytest.raises(TriviumError, match=message):
        Tokenizer.wordpiece(pieces)


# --------------------------------------------------------------------------------------------------- learned

LEARN = """
import json, sys
from trivium.data.tokenizer import Tokenizer
texts = json.loads(sys.stdin.read())
tokenizer = Tokenizer.train(texts, 150)
print(json.dumps([tokenizer._tokenizer.id_to_token(number) for number in range(tokenizer.vocab_size)]))
"""


def test_the_same_text_in_any_order_and_process_gives_the_same_vocabulary() -> None:
    """Each process has its own hash seeds, in Python and in the library."""
    vocabularies = set()
    for seed in range(2):
        texts = random.Random(seed).sample(CAPTIONS + GERMAN, len(CAPTIONS + GERMAN))
        run = subprocess.run(
            [sys.executable, "-c", LEARN], input=json.dumps(texts), capture_output=True, text=True, check=True
        )
        vocabularies.add(run.stdout)
    assert len(vocabularies) == 1
    pieces = json.loads(vocabularies.pop())
    assert pieces[:5] == list(BERT_SPECIALS)
    assert len(pieces) == 150


def test_a_learned_vocabulary_covers_its_text() -> None:
    tokenizer = Tokenizer.train(CAPTIONS + GERMAN + JAPANESE, 400)
    encoded = tokenizer.encode(CAPTIONS + GERMAN + JAPANESE, 512)
    assert not any(tokenizer.unk_id in ids for ids in encoded)
    [lighthouse] = tokenizer.encode(["lighthouse"], 10)
    assert len(lighthouse) == 3  # frequent enough for a piece of its own
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)


def test_a_vocabulary_too_small_for_its_characters() -> None:
    with pytest.raises(TriviumError, match="vocabulary of 20 cannot hold the characters"):
        Tokenizer.train(CAPTIONS, 20)


# ----------------------------------------------------------------------------------------------------- files


def unigram(texts: list[str], folder: Path) -> Path:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=specials, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("texts", [GERMAN, JAPANESE], ids=["german", "japanese"])
def test_a_unigram_file_of_another_language(texts: list[str], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(unigram(texts, tmp_path))
    [ids] = tokenizer.encode(texts[:1], 64)  # the file's own truncation to 3 and padding to 9 do not count
    assert (ids[0], ids[-1]) == (tokenizer.cls_id, tokenizer.sep_id) == (0, 2)
    assert tokenizer.decode(ids) == texts[0]
    assert tokenizer.unk_id not in ids
    assert (tokenizer.pad_id, tokenizer.mask_id) == (1, 4)
    pieces = [tokenizer._tokenizer.id_to_token(number) for number in ids[1:-1]]
    assert [bool(tokenizer.continues[number]) for number in ids[1:-1]] == [piece[0] != "▁" for piece in pieces]
    assert not tokenizer.continues[list(tokenizer.special_ids)].any()


def bytelevel_bpe(texts: list[str], folder: Path, **options: object) -> Path:
    tokenizer = tokenizers.Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_a_byte_level_file_and_a_missing_mask(tmp_path: Path) -> None:
    file = bytelevel_bpe(GERMAN + JAPANESE, tmp_path)
    tokenizer = Tokenizer.from_file(file)
    [ids] = tokenizer.encode(["Zwei Hunde"], 64)
    starts = [number for number in ids[1:-1] if not tokenizer.continues[number]]
    assert len(starts) == 2
    with pytest.raises(TriviumError, match=r"tokenizer.json has no mask token: .* must hold \[MASK\] or <mask>$"):
        _ = tokenizer.mask_id


def test_a_file_that_marks_ends_of_words_cannot_mask_whole_words(tmp_path: Path) -> None:
    vocabulary = {"<s>": 0, "</s>": 1, "a</w>": 2, "b": 3}
    tokenizers.Tokenizer(models.BPE(vocabulary, [], end_of_word_suffix="</w>")).save(str(tmp_path / "clip.json"))
    with pytest.raises(TriviumError, match=r"clip.json marks where a word ends"):
        _ = Tokenizer.from_file(tmp_path / "clip.json").continues


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"type": "Magic"}}', "\xff"])
def test_a_broken_file(content: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(TriviumError, match=r"tokenizer\.json"):
        Tokenizer.from_file(file)
    with pytest.raises(TriviumError, match="does not exist"):
        Tokenizer.from_file(tmp_path / "none.json")


def test_saved_loaded_and_pickled_it_stays_the_same(vocabulary: list[str], tmp_path: Path) -> None:
    tokenizer = Tokenizer.wordpiece(vocabulary)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    for copy in (Tokenizer.from_file(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.encode(HARD, 30) == tokenizer.encode(HARD, 30)
        assert copy.special_ids == tokenizer.special_ids
        assert copy.continues.tolist() == tokenizer.continues.tolist()


def test_a_saved_file_makes_whole_sequences_in_other_programs(vocabulary: list[str], tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.wordpiece(vocabulary)
    tokenizer.save(tmp_path / "tokenizer.json")
    other = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert other(CAPTIONS)["input_ids"] == tokenizer.encode(CAPTIONS, 512)


def test_a_full_disk_leaves_the_old_file(
    vocabulary: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        Tokenizer.wordpiece(vocabulary).save(file)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


FORK = """
import os
from trivium.data.tokenizer import Tokenizer
tokenizer = Tokenizer.train(["a red mug"] * 9, 40)
ids = tokenizer.encode(["a red mug"] * 1000, 8)
child = os.fork()
if child == 0:
    os._exit(0 if tokenizer.encode(["a red mug"] * 1000, 8) == ids else 1)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_worker_encodes_without_a_word() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    run = subprocess.run([sys.executable, "-c", FORK], env=environment, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")


def test_nothing_warns(vocabulary: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tokenizer.wordpiece(vocabulary).encode(HARD, 16)


# ------------------------------------------------------------------------------------------- CLIP's byte pairs

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_HARD = [*CAPTIONS, *JAPANESE, "", "   ", "The DOG's  thing\tin\n1999, isn't it?", "Zoë's naïve e\u0301 👍 x" * 3,
             "they'll 'tis we've ''s --- $5.00", "\u00a0no\u2003break\u200b"]  # fmt: skip


def as_openai_does(text: str, merges: list[tuple[str, str]]) -> list[str]:
    """The pieces of a text by the published rule, one pair at a time."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [number for number in range(256) if number not in visible]
    letters = {number: chr(number) for number in visible} | {n: chr(256 + i) for i, n in enumerate(hidden)}
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip().lower()
    # [^\W\d_] is a letter to `re`, as \p{L} is, but for what these texts do not hold.
    words = re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+", text)
    found = []
    for word in words:
        pieces = [letters[byte] for byte in word.encode()]
        pieces[-1] += "</w>"
        while len(pieces) > 1:
            rank, at = min((ranks.get(pair, 10**9), n) for n, pair in enumerate(zip(pieces, pieces[1:], strict=False)))
            if rank == 10**9:
                break
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        found += pieces
    return found


@pytest.mark.parametrize("text", CLIP_HARD)
def test_byte_pairs_are_openai_s_to_the_piece_and_hugging_face_s_to_the_id(tmp_path: Path, text: str) -> None:
    from transformers import CLIPTokenizer

    tokenizer = Tokenizer.from_file(openai_file(tmp_path))
    [ids] = tokenizer.encode([text], 10_000)
    vocabulary = json.loads(tokenizer._tokenizer.to_str())["model"]["vocab"]
    pieces = {number: piece for piece, number in vocabulary.items()}
    assert [pieces[number] for number in ids] == [START, *as_openai_does(text, PAIRS), END]
    theirs = CLIPTokenizer(vocab=vocabulary, merges=list(PAIRS))
    assert theirs(text)["input_ids"] == ids
    # Their file, their two files and our own saved file are the same tokenizer.
    theirs.save_pretrained(tmp_path / "hf")
    tokenizer.save(tmp_path / "ours.json")
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    openai_file(tmp_path, "merges.txt")
    for same in (
        Tokenizer.from_file(tmp_path / "hf" / "tokenizer.json"),
        Tokenizer.from_file(tmp_path / "ours.json"),
        Tokenizer.from_vocabulary_and_merges(tmp_path / "vocab.json", tmp_path / "merges.txt"),
        Tokenizer.from_file(openai_file(tmp_path, "again.txt.gz")),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert same.encode([text], 10_000) == [ids]
        assert same.decode(ids) == tokenizer.decode(ids)


def test_byte_pairs_of_a_text_and_back(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(openai_file(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.cls_id, tokenizer.sep_id) == (512 + len(PAIRS) + 2, 526, 527)
    assert tokenizer.decode(tokenizer.encode(["The  dog in München"], 77)[0]) == "the dog in münchen"
    assert tokenizer.encode([""], 77) == [[526, 527]]
    cut = tokenizer.encode(["one two three four five"], 6)[0]
    assert len(cut) == 6 and cut[-1] == tokenizer.sep_id
    ids_BT, mask_BT = tokenizer.pad([[526, 5, 527], [526, 527]])
    assert ids_BT.tolist() == [[526, 5, 527], [526, 527, 527]]  # the first end token counts
    assert mask_BT.sum(1).tolist() == [3, 2]
    with pytest.raises(TriviumError, match="has no mask token"):
        _ = tokenizer.mask_id
    with pytest.raises(TriviumError, match="marks where a word ends"):
        _ = tokenizer.continues


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "cannot be read"),
        (lambda path: path.write_text("#version\ni n\nthe\n"), "line 3: 'the' is no pair"),
        (lambda path: path.write_text("#version\nqq zz\n"), "do not belong together"),
    ],
)
def test_a_list_of_byte_pairs_that_is_none_says_why(tmp_path: Path, write: object, says: str) -> None:
    path = tmp_path / "merges.txt"
    write(path)  # type: ignore[operator]
    with pytest.raises(TriviumError, match=says):
        Tokenizer.from_file(path)
    gz = tmp_path / "cut.txt.gz"
    gz.write_bytes(gzip.compress(b"#version\ni n\n" * 100)[:-9])
    with pytest.raises(TriviumError, match="cannot be read as a list of byte pairs"):
        Tokenizer.from_file(gz)


def test_a_vocabulary_without_clip_s_tokens_is_refused() -> None:
    with pytest.raises(TriviumError, match=r"lacks <\|startoftext\|> and <\|endoftext\|>"):
        Tokenizer.byte_pairs({"a": 0}, [])


@pytest.mark.data
def test_the_published_byte_pairs_have_their_published_ids() -> None:
    path = Path(os.environ["TRIVIUM_DATA"]) / "vocab" / "bpe_simple_vocab_16e6.txt.gz"
    tokenizer = Tokenizer.from_file(path)
    assert (tokenizer.vocab_size, tokenizer.cls_id, tokenizer.sep_id) == (49408, 49406, 49407)
    assert tokenizer.encode(["a photo of a cat"], 77) == [[49406, 320, 1125, 539, 320, 2368, 49407]]
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()[1:48895]
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    for text in CLIP_HARD:
        pieces = [tokenizer._tokenizer.id_to_token(number) for number in tokenizer.encode([text], 10_000)[0]]
        assert pieces == [START, *as_openai_does(text, merges), END]


def test_captions_are_read_without_marks_and_end_open(tmp_path: Path) -> None:
    """What ALBEF's public code makes of a caption; the file says it too."""
    plain = Tokenizer.wordpiece(bert_vocabulary())
    captions = plain.for_captions()
    [ids] = captions.encode(['A man, "happy" (smiling): two-wheeled bike/car; it\'s #1!'], 64)
    [expected] = plain.encode(["a man happy smiling two wheeled bike car its 1"], 64)
    assert ids == expected[:-1]
    assert captions.encode(["a dog", ""], 2) == [[101, 1037], [101]]
    assert captions.special_ids == plain.special_ids and captions.vocab_size == plain.vocab_size
    captions.save(tmp_path / "tokenizer.json")
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert again.encode(["A dog."], 9) == captions.encode(["A dog."], 9) == [[101, 1037, 3899]]
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert other.encode("A dog.").ids == [101, 1037, 3899]  # and other programs do as it says
    assert again.for_captions().encode(["A dog."], 9) == [[101, 1037, 3899]]
    answer = ["dog's, 5:30"]  # marks stay, however often it was made one for captions
    assert again.for_captions().for_answers().encode(answer, 20) == plain.encode(answer, 20)
    assert plain.encode(["a dog."], 9) == [[101, 1037, 3899, 1012, 102]]


@pytest.mark.parametrize("captions", [False, True])
def test_words_say_which_tokens_are_theirs(captions: bool) -> None:
    tokenizer = Tokenizer.wordpiece(bert_vocabulary())
    tokenizer = tokenizer.for_captions() if captions else tokenizer
    text = "Two  giraffes, eating-grass!"
    [ids] = tokenizer.encode([text], 64)
    found = tokenizer.words(text, 64)
    marks = [",", "-", "!"] if not captions else []
    assert [word for word, _, _ in found if word not in marks] == ["two", "giraffes", "eating", "grass"]
    assert [first for _, first, _ in found] == [1, *(end for _, _, end in found[:-1])], "one after the other"
    assert found[-1][2] == len(ids) - (not captions), "up to the end, without [SEP]"
    for word, first, end in found:
        assert tokenizer.decode(ids[first:end]) == word
    pieces = next((first, end) for word, first, end in found if word == "giraffes")
    assert pieces[1] - pieces[0] >= 2, "a word of several pieces"
    cut = tokenizer.words(text, 4)
    assert cut[-1][2] <= 4 and [word for word, _, _ in cut][:1] == ["two"]
    assert tokenizer.words("", 64) == []
