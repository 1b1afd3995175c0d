"""Drawings cut out of their paper: against coverage that is known, and by splits that never meet."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from trivium.data import embedded
from trivium.data.decode import decode
from trivium.data.drawings import (
    CLIPART_STYLE,
    GROUPS,
    HUES,
    SUBGROUPS,
    Drawing,
    categories,
    cut,
    dominant_hue,
    pool,
    unmix,
)
from trivium.errors import TriviumError

FINE = 16  # by how much finer the drawing is made whose coverage is known


def drawn(paint: str) -> tuple[np.ndarray, np.ndarray]:
    """A drawing of 64 x 64 on white, uint8 [H, W, 3], and the exact share of each pixel that it covers."""
    side = 64 * FINE
    colour, cover = Image.new("RGB", (side, side), "white"), Image.new("L", (side, side), 0)
    pens = ImageDraw.Draw(colour), ImageDraw.Draw(cover)

    def ellipse(box: tuple[float, ...], fill: str) -> None:
        corners = tuple(FINE * each for each in box)
        pens[0].ellipse(corners, fill=fill)
        pens[1].ellipse(corners, fill=255)

    ellipse((6, 10, 57, 50), paint)
    ellipse((20, 20, 30, 30), "white")  # an eye: white that the drawing surrounds
    if paint == "#202020":
        pens[0].rectangle((0, 45 * FINE, side, side), fill=paint)  # to the borders of the picture
        pens[1].rectangle((0, 45 * FINE, side, side), fill=255)
    shrink = {"size": (64, 64), "resample": Image.Resampling.BOX}
    return np.asarray(colour.resize(**shrink)), np.asarray(cover.resize(**shrink)) / 255


@pytest.mark.parametrize("paint", ["#dd2e44", "#55acee", "#202020", "#8a6d00"])
def test_white_inside_stays_and_edges_get_their_share(paint: str) -> None:
    pixels_HWC, cover_HW = drawn(paint)
    alpha_HW, colour_CHW = unmix(pixels_HWC)
    assert (alpha_HW[cover_HW == 1] == 1).all()
    assert (alpha_HW[cover_HW == 0] == 0).all()
    edge_HW = (cover_HW > 0.1) & (cover_HW < 1)
    assert edge_HW.sum() > 50
    errors = np.sort(np.abs(alpha_HW - cover_HW)[edge_HW])
    assert errors[-4] < 0.03  # all but where two lines meet in a notch
    assert errors[-1] < 0.15
    assert ((alpha_HW >= 0.5) == (cover_HW >= 0.5))[np.abs(cover_HW - 0.5) > 0.03].all()
    paint_C = np.array([int(paint[i : i + 2], 16) for i in (1, 3, 5)])
    away = np.sort(np.abs(colour_CHW[:, edge_HW & (alpha_HW < 1)] - paint_C[:, None]).max(axis=0))
    assert away[-4] < 2  # no pale line on another background
    assert away[-1] < 20


@pytest.mark.parametrize("paint", ["#dd2e44", "#55acee", "#202020"])
def test_as_the_files_are_compressed(paint: str) -> None:
    pixels_HWC, cover_HW = drawn(paint)
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "WEBP", quality=80, method=6)
    alpha_HW, _ = unmix(decode(buffer.getvalue()))
    solid_HW, true_HW = alpha_HW >= 0.5, cover_HW >= 0.5
    assert (solid_HW & true_HW).sum() >= 0.985 * (solid_HW | true_HW).sum()
    assert solid_HW[cover_HW == 1].all()


def test_pale_specks_go_and_small_parts_stay() -> None:
    pixels_HWC = np.full((64, 64, 3), 255, np.uint8)
    pixels_HWC[20:50, 20:50] = (0, 0, 200)
    pixels_HWC[5:7, 5:8] = 230
    pixels_HWC[5:7, 40:43] = (200, 0, 0)
    alpha_HW, _ = unmix(pixels_HWC)
    assert alpha_HW[5:7, 5:8].max() == 0
    assert alpha_HW[5:7, 40:43].min() == 1


def drawing(pixels_HWC: np.ndarray, is_flag: bool = False) -> Drawing:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG")
    return Drawing(buffer.getvalue(), "a", "a", CLIPART_STYLE, 0, is_flag)


def test_what_cannot_be_cut_out() -> None:
    white_HWC = np.full((64, 64, 3), 255, np.uint8)
    assert cut(drawing(white_HWC)) is None
    lines_HWC = white_HWC.copy()
    lines_HWC[:, ::8] = 0  # 512 pixels, of which nothing is left at 20 x 20
    assert cut(drawing(lines_HWC)) is None
    lines_HWC[:, 1::8] = lines_HWC[:, 2::8] = lines_HWC[:, 3::8] = lines_HWC[:, 4::8] = 0
    assert cut(drawing(lines_HWC)) is not None
    stripes_HWC = white_HWC.copy()  # white above red: the white has no edge
    stripes_HWC[32:54] = (220, 0, 0)
    assert cut(drawing(stripes_HWC, is_flag=True)) is None
    assert cut(drawing(stripes_HWC)) is not None
    stripes_HWC[10:32] = (240, 240, 240)  # but where it is not quite white it has
    whole = cut(drawing(stripes_HWC, is_flag=True))
    assert whole is not None
    assert whole.picture.size == (64, 44)
    assert whole.at(32).shape == (22, 32, 4)
    assert whole.at(32)[..., 3].min() == 255


def test_hues_of_known_colours() -> None:
    known = {
        "red": "#dd2e44", "orange": "#f4900c", "yellow": "#ffcc4d", "green": "#77b255", "blue": "#55acee",
        "purple": "#7e45d9", "pink": "#ff4fa8", "brown": "#744b27",
    }  # fmt: skip
    assert tuple(known) == HUES

    def of(*colours: str) -> str | None:
        values = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in colours]
        return dominant_hue(np.repeat(np.array(values, np.float32).T, 50, axis=1))

    assert {hue: of(colour) for hue, colour in known.items()} == {hue: hue for hue in HUES}
    assert [of("#333333"), of("#ffffff", "#999999"), of("#000000")] == [None] * 3
    assert of("#dd2e44", "#ffffff") == "red"
    assert of("#dd2e44", "#55acee") is None
    assert of("#dd2e44", "#ffffff", "#ffffff") is None


@pytest.mark.parametrize("classes", ["group", "subgroup"])
def test_no_split_shows_what_another_holds_out(classes: str) -> None:
    def drawings(split: str) -> list[Drawing]:
        return [each for concepts in pool(split, classes) for styles in concepts for each in styles]

    of = {each.codepoints: each.split for each in embedded.emoji()}
    train, concepts, style, both = map(drawings, ("train", "held-out-concepts", "held-out-style", "held-out-both"))
    assert drawings("new-scenes") == train
    for known in (train, style):
        assert not {each.concept for each in known} & {each.concept for each in (*concepts, *both)}
        assert not {each.image for each in known} & {each.image for each in (*concepts, *both)}
        assert not {each.name.lower() for each in known} & {each.name.lower() for each in (*concepts, *both)}
        assert {of[each.concept] for each in known if each.style != CLIPART_STYLE} == {"train"}
    assert {of[each.concept] for each in (*concepts, *both) if each.style != CLIPART_STYLE} == {"val", "test"}
    assert {each.style for each in (*style, *both)} == {"noto"}
    assert "noto" not in {each.style for each in (*train, *concepts)}
    assert not {each.image for each in train} & {each.image for each in style}
    assert len(train) > 1500


def test_categories_are_those_of_the_data() -> None:
    records = embedded.emoji()
    assert {category.name for category in GROUPS} == {record.group for record in records} - {""}
    groups_of = {record.subgroup: record.group for record in records}
    assert all(groups_of[category.name] == category.group for category in SUBGROUPS)
    for classes in ("group", "subgroup"):
        nouns = [word for category in categories(classes) for word in (category.noun, category.plural)]
        assert len(set(nouns)) == len(nouns)


def test_a_split_that_does_not_exist() -> None:
    with pytest.raises(TriviumError, match="no scenes of the split 'validation': choose one of train, new-scenes"):
        pool("validation", "group")
