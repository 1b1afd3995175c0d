"""The annotation files of PMD's subsets, in their official fields, as pairs of a caption and its picture's name.

One reader a subset, a generator over files. What it yields is a pair, or the rule by which an entry is left out, or the
BadSample that says which entry is broken. Easy to get wrong: CC3M is (caption, url), CC12M (url, caption), both without
a header and without quoting; a Localized Narrative of COCO names its picture by a number without zeros; regions of
Visual Genome are in pixels of the picture's first size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import unquote_plus

from trivium.data.english import is_english
from trivium.data.records import Record, json_elements, json_lines, json_object, lines, records
from trivium.errors import BadSample, TriviumError

Box = tuple[float, float, float, float]  # left, top, right, bottom as shares of the picture's width and height


@dataclass(frozen=True, slots=True)
class Pair:
    caption: str
    file: str  # the annotation file, and the entry in it
    entry: str
    url: str | None = None
    names: tuple[str, ...] = ()  # under which its picture may lie on a disk: no folder, no suffix
    box: Box | None = None  # the part of the picture that is meant; None: all of it


@dataclass(frozen=True, slots=True)
class Dropped:
    """An entry that a rule leaves out."""

    why: str


Entry = Pair | Dropped | BadSample
HeldOut = frozenset[str]  # "coco 42", "flickr30k 1000092795"
Reader = Callable[[Sequence[str], HeldOut], Iterator[Entry]]

HELD_OUT = Dropped("held out for evaluation")
NOT_ENGLISH = Dropped("not English")
OPEN_IMAGES = "https://open-images-dataset.s3.amazonaws.com"
COCO_IMAGES = "http://images.cocodataset.org"


def held_out_pictures(files: Sequence[str]) -> HeldOut:
    """The pictures of the splits val and test in Karpathy's dataset_coco.json and dataset_flickr30k.json."""
    found = set()
    for file in files:
        with _needed():
            splits = json_object(file)
            name = splits.text("dataset")
            for number, fields in enumerate(splits.items("images")):
                image = Record(file, f"image {number}", fields)
                key = image.integer("cocoid") if name == "coco" else _stem(image.text("filename"))
                if image.text("split") in ("val", "test"):
                    found.add(f"{name} {key}")
    return frozenset(found)


# ------------------------------------------------------------------------------------------- files of the owners


def coco(files: Sequence[str], held_out: HeldOut) -> Iterator[Entry]:
    """captions_train2014.json: images (id, file_name, coco_url) and annotations (image_id, caption)."""
    for file in files:
        content = json_object(file)
        with _needed():
            described = [Record(file, f"image {number}", each) for number, each in enumerate(content.items("images"))]
            images = {image.integer("id"): image for image in described}

        def pairs(annotation: Record, images: dict[int, Record] = images) -> Iterator[Pair | Dropped]:
            number = annotation.integer("image_id")
            if number not in images:
                raise annotation.bad(f"it is of image {number}, which the file does not describe")
            if f"coco {number}" in held_out:
                yield HELD_OUT
                return
            names = (_stem(images[number].text("file_name")), f"{number:012d}")
            url = _address(images[number], "coco_url")
            yield Pair(annotation.text("caption"), annotation.file, annotation.entry, url, names)

        yield from _each(_numbered(content, "annotations", "annotation"), pairs)


def visual_genome(files: Sequence[str], held_out: HeldOut) -> Iterator[Entry]:
    """region_descriptions.json: regions (image_id, phrase, x, y, width, height) of each picture; and image_data.json:
    image_id, url, width, height, coco_id. A pair is a region, cut out, with its phrase. Version 1.0 says image where
    1.2 says image_id, and id in image_data.json."""
    images: dict[int, Record] = {}
    described = []
    for file in files:
        first = next(json_elements(file), None)
        with _needed():
            if first is None or first.optional("regions") is not None:
                described.append(file)
            else:
                images |= {record.integer("image_id", "id"): record for record in json_elements(file)}
    if not images or not described:
        lacking = "region_descriptions.json" if images else "image_data.json"
        raise TriviumError(f"Visual Genome comes in two files and {lacking} is not given: name both")

    def pairs(region: Record) -> Iterator[Pair | Dropped]:
        number = region.integer("image_id", "image")
        if number not in images:
            raise region.bad(f"it is of image {number}, which image_data.json does not describe")
        image = images[number]
        if f"coco {image.optional('coco_id')}" in held_out:
            yield HELD_OUT
            return
        width, height = image.number("width"), image.number("height")
        left, top = max(0, region.number("x")), max(0, region.number("y"))
        right = min(width, region.number("x") + region.number("width"))
        bottom = min(height, region.number("y") + region.number("height"))
        if right <= left or bottom <= top:
            raise region.bad("its region is empty or outside the picture")
        box = (left / width, top / height, right / width, bottom / height)
        url = _address(image, "url")
        yield Pair(region.text("phrase"), region.file, region.entry, url, (str(number),), box)

    for file in described:
        for picture in json_elements(file):
            yield from _each(_numbered(picture, "regions", f"{picture.entry}, region"), pairs)


def localized_narratives(files: Sequence[str], held_out: HeldOut) -> Iterator[Entry]:
    """JSON lines, with traces or as captions only: dataset_id, image_id, caption. A pair is a sentence."""

    def pairs(narrative: Record) -> Iterator[Pair | Dropped]:
        dataset, image = narrative.text("dataset_id"), str(narrative.value("image_id"))
        split = re.split(r"[_-]", dataset)[-1].lower()
        url = None
        names: tuple[str, ...] = (image,)
        if dataset.lower().startswith("mscoco"):
            if not image.isdigit():
                raise narrative.bad(f'its image_id "{image}" is no number of COCO')
            names = (f"{int(image):012d}",)
            url = f"{COCO_IMAGES}/{split}/{names[0]}.jpg"
            if f"coco {int(image)}" in held_out:
                yield HELD_OUT
                return
        elif dataset.lower().startswith("open"):
            url = f"{OPEN_IMAGES}/{split}/{image}.jpg"
        elif f"flickr30k {image}" in held_out:
            yield HELD_OUT
            return
        for sentence in re.split(r"(?<=[.!?])\s+", narrative.text("caption")):
            yield Pair(sentence, narrative.file, narrative.entry, url, names)

    for file in files:
        yield from _each(json_lines(file), pairs)


def redcaps(files: Sequence[str], held_out: HeldOut) -> Iterator[Entry]:
    """One JSON file a subreddit and year: annotations (image_id, image_url, raw_caption, caption)."""

    def pairs(post: Record) -> Iterator[Pair]:
        caption = post.text("raw_caption", "caption")
        yield Pair(caption, post.file, post.entry, post.text("image_url"), (str(post.value("image_id")),))

    for file in files:
        yield from _each(_numbered(json_object(file), "annotations", "annotation"), pairs)


def conceptual_3m(files: Sequence[str], held_out: HeldOut) -> Iterator[Entry]:
    """Train_GCC-training.tsv: caption and url between a tab."""
    return _conceptual(files, ("caption", "url"))


def conceptual_12m(files: Sequence[str], held_out: HeldOut) -> Iterator[Entry]:
    """cc12m.tsv: url and caption between a tab."""
    return _conceptual(files, ("url", "caption"))


def _conceptual(files: Sequence[str], columns: tuple[str, str]) -> Iterator[Entry]:
    for file in files:
        order = columns
        for line in lines(file):
            if isinstance(line, BadSample):
                yield line
                continue
            number, text = line
            fields = text.split("\t")
            if number == 1 and sorted(fields) == ["caption", "url"]:  # many copies have been given a header
                order = (fields[0], fields[1])
                continue
            record = Record(file, f"line {number}", dict(zip(order, fields, strict=False)))
            if len(fields) != 2:
                yield record.bad(f"it has {len(fields)} fields, not {' and '.join(order)}")
            else:
                yield from _each([record], _captioned)


# --------------------------------------------------------------------------------------------------------- tables


def captioned(files: Sequence[str], held_out: HeldOut) -> Iterator[Entry]:
    """Tables with the columns url and caption, as img2dataset reads and writes them; sbu-captions-all.json too.

    The fields of a TSV may stand in quotes, as in WIT's own.
    """
    for file in files:
        yield from _each(records(file, quoted_tsv=True), _captioned)


def wikipedia(files: Sequence[str], held_out: HeldOut) -> Iterator[Entry]:
    """WIT's own tables: language, image_url, caption_reference_description; or those with url and caption."""

    def pairs(record: Record) -> Iterator[Pair | Dropped]:
        language = record.optional("language", "lang")
        caption = record.optional("caption", "caption_reference_description")
        if language is not None and language != "en":
            yield NOT_ENGLISH
        elif caption is None and "caption_reference_description" in record.fields:
            yield Dropped("no reference description")
        elif language is None and not is_english(record.text("caption", "caption_reference_description")):
            yield NOT_ENGLISH
        else:
            yield from _captioned(record)

    for file in files:
        yield from _each(records(file, quoted_tsv=True), pairs)


def yfcc(files: Sequence[str], held_out: HeldOut) -> Iterator[Entry]:
    """Tables with a url (or downloadurl), description and title (or one caption).

    The description is taken if it has more than two words and is English, else the title likewise (FLAVA, section 4).
    A column language decides where there is one, else ``is_english``. The owners' files write a blank as "+".
    """

    def pairs(record: Record) -> Iterator[Pair | Dropped]:
        language = record.optional("language", "lang")
        texts = [record.optional(name) for name in ("description", "title", "caption")]
        captions = [" ".join(_unquoted(text).split()) for text in texts if isinstance(text, str)]
        long = [caption for caption in captions if sum(any(map(str.isalpha, word)) for word in caption.split()) > 2]
        english = [caption for caption in long if (is_english(caption) if language is None else language == "en")]
        if not any(name in record.fields for name in ("description", "title", "caption")):
            raise record.bad('it has no "description|title|caption"')
        if english:
            yield _pair(record, english[0])
        elif not captions:
            yield Dropped("no text")
        else:
            yield NOT_ENGLISH if long else Dropped("two words or fewer")

    for file in files:
        yield from _each(records(file, quoted_tsv=True), pairs)


def _captioned(record: Record) -> Iterator[Pair]:
    yield _pair(record, record.text("caption", "captions", "text", "caption_reference_description"))


def _pair(record: Record, caption: str) -> Pair:
    """Raises BadSample."""
    url = record.text("url", "image_url", "image_urls", "downloadurl")
    if not url.startswith(("http://", "https://")):
        raise record.bad(f'its url "{url[:60]}" is no web address')
    number = record.optional("image_id", "photoid", "photo_id", "uid", "id")
    return Pair(caption, record.file, record.entry, url, () if number is None else (str(number),))


def _unquoted(text: str) -> str:
    """A text that is written as in a web address, as plain text; any other stays."""
    return unquote_plus(text) if not re.search(r"\s", text) and re.search(r"\+|%[0-9A-Fa-f]{2}", text) else text


# --------------------------------------------------------------------------------------------------------- entries


def _numbered(record: Record, name: str, word: str) -> Iterator[Record | BadSample]:
    """The entries of a list inside a record. Raises TriviumError where a whole file lacks the list."""
    try:
        items = record.items(name)
    except BadSample as error:
        if not record.entry:
            raise TriviumError(f"{error}: is it the file you mean?") from None
        yield error
        return
    for number, fields in enumerate(items):
        yield Record(record.file, f"{word} {number}", fields)


@contextmanager
def _needed() -> Iterator[None]:
    """What everything else of a file hangs on: broken, it is a TriviumError."""
    try:
        yield
    except BadSample as error:
        raise TriviumError(f"{error}: is it the file you mean?") from None


def _each(found: Iterable[Record | BadSample], pairs: Callable[[Record], Iterator[Pair | Dropped]]) -> Iterator[Entry]:
    for record in found:
        if isinstance(record, BadSample):
            yield record
            continue
        try:
            yield from pairs(record)
        except BadSample as error:
            yield error


def _address(image: Record, name: str) -> str | None:
    """Raises BadSample."""
    return None if image.optional(name) is None else image.text(name)


def _stem(name: str) -> str:
    return name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
