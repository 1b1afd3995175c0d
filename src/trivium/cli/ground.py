"""``trivium ground``: where in a picture the words of a text are."""

from __future__ import annotations

from pathlib import Path

from trivium.errors import TriviumError


def ground(
    path: Path,
    *,
    image: Path,
    text: str,
    block: int | None = None,
    image_size: int | None = None,
    out: Path = Path("ground.png"),
) -> None:
    """Write heat maps over a picture, one for each word of a text and one for the whole text, as one image.

    A model shows where it looks for the words when it judges whether picture and text belong together (Grad-CAM); it
    needs a matching head and words that attend patches: ALBEF and FLAVA.

    Args:
        path: the model: a run folder, a model folder, or weights of another library.
        image: the picture.
        text: what is looked for, such as "a red mug on a table".
        block: whose attention is shown, of the blocks that fuse picture and text, from 0; by default the middle one,
            of ALBEF's six the third, as published. In the last one only the whole text is looked for.
        image_size: pixels on the side of the picture, where not the model's own: its positions are interpolated.
        out: the image to write, .png or .jpg.
    """
    if not image.is_file():
        raise TriviumError(f"{image}: there is no such picture")
    if not text.strip():
        raise TriviumError("the text to look for is empty")
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise TriviumError(f"--out {out}: an image is a .png or a .jpg")
    if out.resolve() == image.resolve():
        raise TriviumError(f"--out {out} is the picture itself, which would be lost: name another")
    from trivium.cli.embed import check_can_write, open_model
    from trivium.explain.heat_maps import heat_wall
    from trivium.manifest import file_beside

    check_can_write(out)
    page = heat_wall(open_model(path, image_size, "cpu"), [(image, text)], block)
    with file_beside(out) as beside:
        page.save(beside, "PNG" if out.suffix.lower() == ".png" else "JPEG")
    print(f"heat maps: {out}")
