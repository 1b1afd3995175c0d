"""The result of a search as one light HTML page with nothing outside it: thumbnails are data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment
from PIL import Image

from trivium.data.decode import DecodeError, decode
from trivium.data.files import readable

THUMBNAIL = 256  # pixels on the longer side


@dataclass(frozen=True)
class Hit:
    rank: int  # from 1
    file: str
    score: float  # cosine with the query
    match: float | None = None  # probability that the matching head gives, where it was asked


def thumbnail(path: Path) -> str | None:
    """A data URI of the picture, at most 256 px on a side; None where the file is gone or is no picture."""
    try:
        picture = Image.fromarray(decode(path.read_bytes()))
    except (OSError, DecodeError):
        return None
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    picture.save(encoded, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def render(query: str | Path, hits: Sequence[Hit], folder: Path, searched: int, model: str) -> str:
    """The page. query: a text, or the path of a picture. searched: how many candidates there were."""
    cards = [(hit, thumbnail(folder / hit.file)) for hit in hits]
    return _TEMPLATE.render(
        query=readable(query.name) if isinstance(query, Path) else query,
        picture=thumbnail(query) if isinstance(query, Path) else None,
        cards=cards,
        searched=searched,
        model=model,
    )


_TEMPLATE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ query }} – search</title>
<style>
  body { margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222; background: #fff;
         font: 16px/1.5 system-ui, sans-serif }
  header { display: flex; gap: 1rem; align-items: center; margin-bottom: 1.5rem }
  header img { max-width: 8rem; max-height: 8rem; border-radius: 6px }
  h1 { margin: 0; font-size: 1.5rem; overflow-wrap: anywhere }
  p { margin: 0; color: #666; font-size: .9rem }
  main { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem }
  figure { margin: 0; border: 1px solid #e3e3e3; border-radius: 8px; overflow: hidden }
  figure div { height: 11rem; display: flex; align-items: center; justify-content: center;
               color: #999; font-size: .85rem }
  figure img { max-width: 100%; max-height: 100% }
  figcaption { padding: .4rem .6rem; font-size: .85rem; overflow-wrap: anywhere; border-top: 1px solid #eee }
  figcaption b { margin-right: .3rem }
  figcaption span { color: #666; display: block }
</style>
<header>
  {% if picture %}
  <img src="{{ picture }}" alt="the query">
  {% endif %}
  <div>
    <h1>{{ query }}</h1>
    <p>{{ cards | length }} of {{ searched }}, by cosine{% if cards and cards[0][0].match is not none %}; the first ones
    put in order by the matching head{% endif %} · {{ model }}</p>
  </div>
</header>
<main>
{% for hit, image in cards %}
  <figure>
    <div>{% if image %}<img src="{{ image }}" alt="{{ hit.file }}">{% else %}no picture{% endif %}</div>
    <figcaption><b>{{ hit.rank }}</b>{{ hit.file }}
    <span>{{ "%.3f" | format(hit.score) }}
    {%- if hit.match is not none %} · match {{ "%.2f" | format(hit.match) }}{% endif %}</span>
    </figcaption>
  </figure>
{% endfor %}
</main>
</html>
""")
