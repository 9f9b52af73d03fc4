"""Pictures for people: sizes, heat maps over them, text below them."""

import numpy as np
import pytest
from PIL import Image

from resnet_jax.data.show import LEAST, MOST, font, overlay, side_by_side, sized, wrapped_lines
from resnet_jax.data.transforms import fit, part_seen


def test_a_map_colours_the_part_that_it_is_of_and_nothing_else():
    picture = np.full((30, 40, 3), 100, np.uint8)
    shown = np.asarray(overlay(picture, np.ones((2, 2), np.float32), (10, 5, 30, 25)))
    changed = (shown != picture).any(-1)
    assert changed[5:25, 10:30].all() and changed.sum() == 400
    assert np.array_equal(np.asarray(overlay(picture, np.zeros((2, 2), np.float32))), picture)


@pytest.mark.parametrize(("shape", "crop"), [((90, 60), 1.0), ((64, 200), 0.875), ((33, 47), 0.9)])
def test_the_part_that_the_network_sees_is_that_which_fit_keeps(shape, crop):
    """A picture that is white inside the part and black outside is white to the network, but for its edge."""
    left, top, right, bottom = (round(edge) for edge in part_seen(shape, 16, crop))
    picture = np.zeros((*shape, 3), np.uint8)
    picture[top:bottom, left:right] = 255
    assert (fit(Image.fromarray(picture), 16, crop)[1:-1, 1:-1] > 250).all()
    assert (bottom - top) == pytest.approx(right - left, abs=2) and left >= 0 and right <= shape[1]


def test_pictures_are_of_a_size_to_be_looked_at():
    small = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    assert np.array_equal(sized(small), small.repeat(20, 0).repeat(20, 1)) and sized(small).shape[0] == LEAST
    usual = np.zeros((300, 400, 3), np.uint8)
    assert sized(usual) is usual or np.array_equal(sized(usual), usual)
    assert sized(np.zeros((1500, 3000, 3), np.uint8)).shape == (MOST // 2, MOST, 3)


def test_long_text_goes_on_in_the_next_line():
    letters = font(12)
    text = "Altdeutscher Schäferhund " + "x" * 60
    lines = wrapped_lines(text, letters, 100)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert len(lines) > 3 and all(letters.getlength(line) <= 100 for line in lines)
    assert wrapped_lines("", letters, 100) == [""] and wrapped_lines("a b", letters, 100) == ["a b"]


def test_two_pictures_stand_side_by_side_above_their_words():
    first, second = (Image.new("RGB", (200, 160), colour) for colour in ("red", "blue"))
    sheets = [np.asarray(side_by_side(first, second, ["one"] * lines)) for lines in (1, 2)]
    assert sheets[0].shape[1] == 408 and 160 < sheets[0].shape[0] < sheets[1].shape[0]
    assert (sheets[0][:160, :200] == (255, 0, 0)).all() and (sheets[0][:160, 208:] == (0, 0, 255)).all()
    assert (sheets[0][160:] < 100).any()
