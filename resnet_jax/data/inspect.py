"""Finds what is wrong with data, by counting: pictures that are there twice, labels that are doubtful, pictures unlike
all others, and classes that are really two. Pure functions of arrays; NumPy alone.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

LOW = 8
"""Frequencies of a picture, in each direction, whose signs are its hash."""
CROPPED = 1 / 16
"""Share of a side that a copy may lack at each edge."""
NEAR_BITS, NEAR_COSINE, NEIGHBOURS = 16, 0.9, 5
"""A pair is compared pixel by pixel where at most NEAR_BITS of the 63 bits of its hashes differ, or where one is among
the NEIGHBOURS nearest of the other and the cosine of their features is at least NEAR_COSINE."""
CANDIDATES = 50
"""Pictures that each is compared with pixel by pixel, on average and in each way, at most."""
ALWAYS = 0.99
"""Correlation from which a pair is always the same picture."""
GRID = 16
"""Side, in pixels, at which two pictures are laid over each other."""
ROWS = 1024
"""Pictures that are compared with all others at once."""


@dataclass(frozen=True)
class Pair:
    """Two pictures that are nearly the same.

    Attributes:
      first, second: indices, of which the first is the smaller.
      likeness: correlation of their pixels where they lie best over each other; 1.0 for the same pixels.
      mirrored: one is the mirror image of the other.
      bits: of 63, that differ between their hashes, as the pictures lie best over each other.
      cosine: of their features; nan without features.
    """

    first: int
    second: int
    likeness: float
    mirrored: bool
    bits: int
    cosine: float


@dataclass(frozen=True)
class DoubtfulLabels:
    """What confident learning says of labels; see `confident_learning`.

    Attributes:
      thresholds: float [classes]: mean probability of a class among the pictures with its label.
      confident: int [classes, classes]: the confident joint; given label in rows, likely one in columns.
      joint: float [classes, classes]: that joint as shares of all pictures, with the given labels' frequencies.
      suspects: int [m]: indices of the doubtful labels, the most doubtful first.
      suggested: int [m]: the likely class of each.
    """

    thresholds: np.ndarray
    confident: np.ndarray
    joint: np.ndarray
    suspects: np.ndarray
    suggested: np.ndarray


def grey_of(pixels: np.ndarray) -> np.ndarray:
    """Returns the luma of pictures [n, height, width, 3] as float32 [n, height, width]."""
    return pixels.astype(np.float32) @ np.asarray([0.299, 0.587, 0.114], np.float32)


def margin_of(side: int) -> int:
    """Returns how many pixels `CROPPED` is of a side."""
    return round(side * CROPPED)


def perceptual_hash(grey: np.ndarray) -> np.ndarray:
    """Returns bool [n, 63] of pictures [n, side, side]: the signs of their lowest cosine coefficients, but for the mean
    (the hash "pHash" of Zauner 2010, with zero in place of the median).

    Compression, brightness and size hardly change it, a small crop changes a few bits.
    """
    side = grey.shape[1]
    basis = np.cos(np.pi * np.arange(LOW)[:, None] * (np.arange(side) + 0.5) / side).astype(np.float32)
    return (basis @ grey @ basis.T).reshape(len(grey), -1)[:, 1:] > 0


def mirrored_hash(bits: np.ndarray) -> np.ndarray:
    """Returns the hashes of the mirror images: odd horizontal frequencies change their sign."""
    odd = (np.arange(LOW * LOW) % LOW % 2 == 1)[1:]
    return bits ^ odd


def hashes_of(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the hashes of pictures [n, side, side] as they are, and without `CROPPED` at each edge."""
    m = margin_of(grey.shape[1])
    return perceptual_hash(grey), perceptual_hash(grey[:, m : grey.shape[1] - m, m : grey.shape[2] - m])


def normalised_differences(pixels: np.ndarray, margin: int) -> np.ndarray:
    """Returns what two pictures are compared by: the differences between neighbouring pixels inside a margin, at `GRID`
    x `GRID`, divided by their norm: float32 [n, grid, grid, 6], the last 3 of them downwards. Differences distinguish
    two pictures of a sky where the pixels themselves hardly do.
    """
    inside = pixels[:, margin : pixels.shape[1] - margin, margin : pixels.shape[2] - margin]
    rows = _shrinking(inside.shape[1])
    parts = (inside[start : start + ROWS].astype(np.float32) for start in range(0, len(inside), ROWS))
    small = np.concatenate([np.einsum("gh,nhwc,kw->ngkc", rows, part, rows, optimize=True) for part in parts])
    across, down = (np.diff(small, axis=axis, append=np.take(small, [-1], axis)) for axis in (2, 1))
    edges = np.concatenate([across, down], -1)
    return edges / np.sqrt((edges**2).sum((1, 2, 3), keepdims=True) + edges[0].size)  # one grey level of noise


def mirrored_differences(edges: np.ndarray) -> np.ndarray:
    """Returns `normalised_differences` of the mirror images."""
    across, down = edges[..., :3], edges[..., 3:]
    across = -np.roll(across[:, :, ::-1], -1, 2)  # the last column is of zeros
    return np.concatenate([across, down[:, :, ::-1]], -1)


def _shrinking(side: int) -> np.ndarray:
    """Returns the matrix [grid, side] that resizes a side linearly, antialiased."""
    grid = min(GRID, side)
    scale = side / grid
    centre = (np.arange(grid) + 0.5) * scale - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(side) - centre[:, None]) / scale)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def near_pairs(pixels: np.ndarray, features: np.ndarray | None = None, least: float = 0.8) -> list[Pair]:
    """Finds pictures that are nearly the same, as they are, mirrored, recompressed or cropped by a little.

    Candidates are pairs whose perceptual hashes are close, and nearest neighbours by features. Each is then laid over
    the other, as it is and mirrored, whole and without a margin, and their differences between neighbouring pixels are
    correlated. Where pictures are alike anyway, as digits are, a pair has to be more alike: 3 robust deviations above
    the median of each picture's most similar one. Time grows with the square of the number of pictures.

    Args:
      pixels: uint8 [n, side, side, 3].
      features: float [n, channels]; None goes by the hashes alone.
      least: correlation from which a pair may be the same picture.

    Returns:
      The pairs, the most alike first.
    """
    whole, inner = hashes_of(grey_of(pixels))
    unit = None if features is None else unit_rows(features)
    found = [_near_by_hash(whole, inner)] + ([] if unit is None else [_near_by_features(unit)])
    first, second = np.divmod(np.unique(np.concatenate(found)), len(pixels))
    laid = [normalised_differences(pixels, margin) for margin in (0, margin_of(pixels.shape[1]))]
    alike, mirrored = np.zeros(len(first), np.float32), np.zeros(len(first), bool)
    for start in range(0, len(first), ROWS):
        i, j = first[start : start + ROWS], second[start : start + ROWS]
        ways = np.stack([*_likeness(laid, i, j), *_likeness(laid, i, j, mirrored=True)])
        same = (pixels[i] == pixels[j]).all((1, 2, 3))
        alike[start : start + ROWS] = np.where(same, 1.0, ways.max(0))
        mirrored[start : start + ROWS] = (ways.argmax(0) >= len(ways) // 2) & ~same
    closest = np.zeros(len(pixels), np.float32)
    np.maximum.at(closest, first, alike)
    np.maximum.at(closest, second, alike)
    middle = np.median(closest)
    usual = middle + 3 * 1.4826 * np.median(np.abs(closest - middle))
    rows = []
    for k in np.flatnonzero(alike >= np.clip(usual, least, max(least, ALWAYS))):
        a, b = int(first[k]), int(second[k])
        others = np.stack([whole[b], inner[b]])
        others = mirrored_hash(others) if mirrored[k] else others
        bits = min((whole[a] ^ others[0]).sum(), (inner[a] ^ others[0]).sum(), (whole[a] ^ others[1]).sum())
        cosine = float("nan") if unit is None else float(unit[a] @ unit[b])
        rows.append(Pair(a, b, round(float(alike[k]), 4), bool(mirrored[k]), int(bits), cosine))
    return sorted(rows, key=lambda pair: (-pair.likeness, pair.first, pair.second))


def _near_by_hash(whole: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """Returns first * n + second, int64, of the pairs whose hashes are near in any of four ways; by fewer bits
    than `NEAR_BITS` where each picture would have more than `CANDIDATES`.
    """
    count, size = whole.shape
    signs = [2.0 * bits.astype(np.float32) - 1 for bits in (whole, mirrored_hash(whole), inner)]
    known = np.concatenate(signs[:2]).T
    some = signs[0][:: -(-count // ROWS)] @ known  # size - 2 * distance
    near = next(n for n in range(NEAR_BITS, -1, -1) if n == 0 or (some >= size - 2 * n).sum() <= CANDIDATES * len(some))
    found = []
    for bits in signs[::2]:
        for start in range(0, count, ROWS):
            i, j = np.nonzero(bits[start : start + ROWS] @ known >= size - 2 * near)
            i, j = i + start, j % count
            found.append((np.minimum(i, j) * count + np.maximum(i, j))[i != j])
    return np.unique(np.concatenate(found)).astype(np.int64)


def _near_by_features(unit: np.ndarray) -> np.ndarray:
    """Returns first * n + second, int64, of nearest neighbours by the cosine of features."""
    index, cosine = neighbours(unit, min(NEIGHBOURS, len(unit) - 1))
    i, k = np.nonzero(cosine >= NEAR_COSINE)
    j = index[i, k]
    return (np.minimum(i, j) * len(unit) + np.maximum(i, j)).astype(np.int64)


def _likeness(laid: list[np.ndarray], first: np.ndarray, second: np.ndarray, mirrored: bool = False) -> list[Any]:
    """Returns the correlations [pairs] of both whole, of the first without margin, of the second without margin."""
    (a, inner_a), (b, inner_b) = ([values[index] for values in laid] for index in (first, second))
    if mirrored:
        b, inner_b = mirrored_differences(b), mirrored_differences(inner_b)
    return [np.einsum("nhwc,nhwc->n", x, y) for x, y in ((a, b), (inner_a, b), (a, inner_b))]


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Returns features [n, channels] less their mean, each row divided by its length."""
    centred = features - features.mean(0)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)


def neighbours(unit: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k nearest other rows of each row of `unit_rows`, the nearest first: int [n, k] and their cosines."""
    index, cosine = np.zeros((len(unit), k), np.int64), np.zeros((len(unit), k), np.float32)
    for start in range(0, len(unit), ROWS):
        product = unit[start : start + ROWS] @ unit.T
        product[np.arange(len(product)), start + np.arange(len(product))] = -np.inf
        near = np.argpartition(-product, k - 1, axis=1)[:, :k]
        near = np.take_along_axis(near, np.argsort(-np.take_along_axis(product, near, 1), 1, kind="stable"), 1)
        index[start : start + ROWS] = near
        cosine[start : start + ROWS] = np.take_along_axis(product, near, 1)
    return index, cosine


def groups_of(count: int, pairs: list[Pair]) -> np.ndarray:
    """Returns int [count]: pictures that pairs connect have the same number, that of the first of them."""
    above = np.arange(count)

    def top(i: int) -> int:
        while above[i] != i:
            above[i] = i = int(above[above[i]])
        return i

    for pair in pairs:
        a, b = sorted((top(pair.first), top(pair.second)))
        above[b] = a
    return np.asarray([top(i) for i in range(count)], np.int64)


def confident_learning(probabilities: np.ndarray, labels: np.ndarray) -> DoubtfulLabels:
    """Counts which labels are doubtful, by confident learning (Northcutt et al. 2021, arXiv:1911.00068).

    A picture counts as class j where its probability of j reaches the mean probability of j among the pictures that
    are labelled j; of several such classes the likeliest counts. Given labels against these classes are the confident
    joint. Those off its diagonal are doubtful; the more, the lower the probability of the given label.

    Args:
      probabilities: float [n, classes] of networks or probes that have not seen the picture's label.
      labels: int [n], as given.
    """
    classes = probabilities.shape[1]
    rows = np.arange(len(labels))
    counts = np.bincount(labels, minlength=classes)
    own = probabilities[rows, labels]
    sums = np.bincount(labels, weights=own, minlength=classes)
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    passed = np.where(probabilities >= thresholds, probabilities, -1.0)
    likely, counted = passed.argmax(1), passed.max(1) >= 0
    confident = np.zeros((classes, classes), np.int64)
    np.add.at(confident, (labels[counted], likely[counted]), 1)
    filled = confident + np.diag((confident.sum(1) == 0) & (counts > 0))  # a class of which nothing was counted
    joint = filled / np.maximum(filled.sum(1, keepdims=True), 1) * counts[:, None] / max(len(labels), 1)
    off = np.flatnonzero(counted & (likely != labels))
    off = off[np.argsort(own[off], kind="stable")]
    return DoubtfulLabels(thresholds, confident, joint, off, likely[off])


def unlike_others(unit: np.ndarray, k: int = 10) -> np.ndarray:
    """Returns float [n]: mean cosine distance of each row of `unit_rows` to its k nearest, over the median of all."""
    cosine = neighbours(unit, min(k, len(unit) - 1))[1]
    distance = 1 - cosine.mean(1)
    return distance / max(float(np.median(distance)), 1e-12)


def far_out(values: np.ndarray, deviations: float = 5.0) -> np.ndarray:
    """Returns the indices of values that lie more than `deviations` robust deviations (1.4826 median absolute
    deviations) above the median, the greatest first.
    """
    middle = np.median(values)
    spread = 1.4826 * np.median(np.abs(values - middle))
    found = np.flatnonzero(values > middle + deviations * max(spread, 1e-12))
    return found[np.argsort(-values[found], kind="stable")]


def two_in_one(features: np.ndarray, seed: int = 0, rounds: int = 50) -> tuple[float, float, np.ndarray]:
    """Splits the pictures of one class in two by 2-means, and measures how far the halves lie apart.

    The split is found on a random half of the pictures and measured on the others, along the line through the two
    centres: the share of the variance there that lies between the halves. A normal distribution that is cut in the
    middle has 0.64 (2 / pi), a flat one 0.75, two points 1.

    Args:
      features: float [n, channels] of the pictures of the class, at least 8.
      seed: of the random half.
      rounds: of 2-means, at most.

    Returns:
      The share between the halves; the share of the pictures in the smaller half; which half each picture is in, bool
      [n], True for the smaller.
    """
    order = np.random.default_rng(seed).permutation(len(features))
    fitted, measured = np.array_split(order, 2)
    known = features[fitted] - features[fitted].mean(0)
    axis = np.linalg.svd(known, full_matrices=False)[2][0]
    half = known @ axis > 0
    for _ in range(rounds):
        if half.all() or not half.any():
            break
        centres = known[~half].mean(0), known[half].mean(0)
        new = ((known - centres[1]) ** 2).sum(1) < ((known - centres[0]) ** 2).sum(1)
        if (new == half).all():
            break
        half = new
    if half.all() or not half.any():
        return 0.0, 0.0, np.zeros(len(features), bool)
    low, high = features[fitted][~half].mean(0), features[fitted][half].mean(0)
    place = (features - (low + high) / 2) @ (high - low)
    side = place > 0
    value, above = place[measured], side[measured]
    if above.all() or not above.any():
        return 0.0, 0.0, np.zeros(len(features), bool)
    share = above.mean()
    between = share * (1 - share) * (value[above].mean() - value[~above].mean()) ** 2
    smaller = side if side.mean() <= 0.5 else ~side
    return float(between / max(value.var(), 1e-12)), float(smaller.mean()), smaller
