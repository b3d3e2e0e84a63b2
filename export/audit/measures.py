"""The papers' own measure of leakage, "distance correlation" (STIP §5.3, §7.3, Figure 6), and what it does not see.

Two different statistics go under that name in the papers, and neither tells how much can be recovered.

- The NDSS text prints 1 − cosine of centred vectors: `paper_distance`, which scipy calls the correlation distance. A
  permuted vector is at a distance of about 1 from itself at *every* width, so it cannot have given Figure 6b.
- Székely, Rizzo and Bakirov's statistic, which both versions cite: `distance_correlation`. Entry by entry, between a
  normal vector and its permuted copy, its median is 0.15 at width 128 and 0.018 at 8192, where the figure has 0.14 and
  0.017. So this, and so applied, is what the figure shows. (|cosine| falls too, but is half of that: 0.06 to 0.007.)

But two vectors that have *nothing* in common give the same values: they are the bias of the statistic, which is about
1.6/√width for independent samples, and fall with the width alone. And taken token by token, the same statistic between
embeddings and their permuted or rotated copies is exactly 1, because neither changes a distance between tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

from export.audit.scene import Scene, Weights
from export.spaces import OnDevice

Values = npt.NDArray[np.floating[Any]]
Draws = np.random.Generator

WIDTHS = tuple(2**power for power in range(7, 14))  # 128 to 8192, as in Figure 6b
REPEATS = 3  # samples a width
TOKENS = 128  # of each
VECTORS = 8  # of each whose entries are compared
ROWS = 16  # that are compared of each parameter
MOST_PARAMETERS = 24
MOST_VALUES = 2**26  # larger parameters are not read
# Figure 6b at its two ends.
PUBLISHED = {"widths": [128, 8192], "permutation": [0.14, 0.017]}


def measure(scene: Scene, widths: tuple[int, ...] = WIDTHS) -> dict[str, Any]:
    """The statistics on drawn vectors of many widths, on what travels, and on parameters, for the report.

    `entries` and `tokens` hold a median for each of `widths` under each name of `TRANSFORMATIONS`.
    """
    draws = np.random.default_rng(0)
    return {
        **by_width(widths, draws),
        "published": PUBLISHED,
        "traffic": _traffic(scene) if scene.text.secret.size else {"skipped": "the model takes no text"},
        "parameters": [] if scene.base is None else list(_parameters(scene, scene.base, draws)),
    }


# --- the statistics ---


def paper_distance(x: Values, y: Values) -> Values:
    """1 − cosine of centred vectors, as the NDSS text prints "distance correlation", along the last axis.

    0: the same up to shift and positive scale; 1: nothing linear in common; 2: opposite. So small means *alike* here,
    while the text reads its small figures as little leakage: see above. A constant vector is at a distance of 1.
    """
    centred_x, centred_y = _centred(x), _centred(y)
    lengths = np.sqrt((centred_x**2).sum(-1) * (centred_y**2).sum(-1))
    products = (centred_x * centred_y).sum(-1)
    distances: Values = 1 - np.divide(products, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return distances


def distance_correlation(x: Values, y: Values) -> float:
    """Sample distance correlation of n paired samples x [n] or [n, p] and y [n] or [n, q].

    Székely, Rizzo, Bakirov, "Measuring and testing dependence by correlation of distances", Annals of Statistics 35(6),
    2007, definition 5: 0 to 1; 1 where y is x up to rotation, shift and scale; 0 where either is constant. For
    independent x and y it tends to 0 with n, but is well above for finite n, and close to 1 where p and q exceed n.
    """
    if x.ndim == y.ndim == 1:
        return float(entrywise(x[None], y[None])[0])
    return _of_centred(_doubly_centred(_distances(x)), _doubly_centred(_distances(y)))


def corrected_distance_correlation(x: Values, y: Values) -> float:
    """The same without its bias: about 0 for independent samples at any n > 3 and any width; 0 where it is negative.

    Square root of the statistic of Székely and Rizzo, Journal of Multivariate Analysis 117, 2013, in the U-centred
    form of "Partial distance correlation with methods for dissimilarities", Annals of Statistics 42(6), 2014.
    """
    return _of_centred(_u_centred(_distances(x)), _u_centred(_distances(y)))


def entrywise(x: Values, y: Values) -> Values:
    """`distance_correlation` of the vectors x [vectors, n] and y [vectors, n], pair by pair, their entries as samples.

    In O(n log² n) rather than O(n²), after Huo and Székely, "Fast computing for distance covariance", Technometrics 58,
    2016.
    """
    x, y = _centred(x), _centred(y)
    order = np.argsort(x, axis=-1)
    x, y = np.take_along_axis(x, order, -1), np.take_along_axis(y, order, -1)
    x_sums, y_sums = _distance_sums(x), _distance_sums(y)
    covariances = _covariances(_distance_products(x, y), x_sums, y_sums)
    x_variances = _covariances(_squared_distances(x), x_sums, x_sums)
    y_variances = _covariances(_squared_distances(y), y_sums, y_sums)
    return np.array([_correlation(*three) for three in zip(covariances, x_variances, y_variances, strict=True)])


def _correlation(covariance: float, x_variance: float, y_variance: float) -> float:
    """From squared distance covariance and variances."""
    if x_variance <= 0 or y_variance <= 0:
        return 0.0
    return float(np.sqrt(max(0.0, covariance) / np.sqrt(x_variance * y_variance)))


def _centred(x: Values) -> Values:
    centred: Values = x.astype(np.float64) - x.mean(-1, dtype=np.float64, keepdims=True)
    return centred


def _distances(samples: Values) -> Values:
    columns = samples.reshape(len(samples), -1).astype(np.float64)
    distances: Values = cdist(columns, columns)
    return distances


def _doubly_centred(distances: Values) -> Values:
    means = distances.mean(0)
    centred: Values = distances - means - means[:, None] + means.mean()
    return centred


def _u_centred(distances: Values) -> Values:
    size = len(distances)
    sums = distances.sum(0)
    centred: Values = distances - (sums + sums[:, None]) / (size - 2) + sums.sum() / ((size - 1) * (size - 2))
    np.fill_diagonal(centred, 0)
    return centred


def _of_centred(x_distances: Values, y_distances: Values) -> float:
    return _correlation((x_distances * y_distances).mean(), (x_distances**2).mean(), (y_distances**2).mean())


def _covariances(products: Values, x_sums: Values, y_sums: Values) -> Values:
    """Squared distance covariances [vectors] from Σ a·b, and Σⱼ aᵢⱼ and Σⱼ bᵢⱼ [vectors, n]."""
    size = x_sums.shape[-1]
    by_sample = 2 * (x_sums * y_sums).sum(-1) / size**3
    covariances: Values = products / size**2 - by_sample + x_sums.sum(-1) * y_sums.sum(-1) / size**4
    return covariances


def _squared_distances(x: Values) -> Values:
    """Σᵢⱼ (xᵢ − xⱼ)² of centred vectors."""
    squared: Values = 2 * x.shape[-1] * (x**2).sum(-1)
    return squared


def _distance_sums(x: Values) -> Values:
    """Σⱼ |xᵢ − xⱼ| for every entry of centred vectors [vectors, n]."""
    size = x.shape[-1]
    order = np.argsort(x, axis=-1)
    rising = np.take_along_axis(x, order, -1)
    below = np.cumsum(rising, -1) - rising  # sum of the smaller entries; of all entries it is 0
    sums = np.empty_like(rising)
    np.put_along_axis(sums, order, (2 * np.arange(size) - size + 1) * rising - 2 * below - rising, -1)
    return sums


def _distance_products(x: Values, y: Values) -> Values:
    """Σᵢⱼ |xᵢ − xⱼ|·|yᵢ − yⱼ| of centred vectors [vectors, n], x rising.

    Twice the pairs j < i, where xᵢ ≥ xⱼ; pairs that fall in y count with the other sign. What the pairs that rise in y
    sum to is gathered as in a merge sort: halves of blocks that double in size, each block sorted by y at once.
    """
    vectors, size = x.shape
    padded = 1 << (size - 1).bit_length()
    columns = np.zeros((4, vectors, padded))
    columns[:, :, :size] = np.ones_like(x), x, y, x * y
    ranked = np.zeros((vectors, padded))
    ranked[:, :size] = y
    rising = np.zeros(vectors)
    half = 1
    while half < padded:
        order = np.argsort(ranked.reshape(vectors, -1, 2 * half), axis=-1)
        values = np.take_along_axis(columns.reshape(4, vectors, -1, 2 * half), order[None], -1)
        left = order < half
        count, x_below, y_below, product_below = np.cumsum(values * left, -1)
        one, x_value, y_value, product = values * ~left  # what pads is 0 in all four
        rising += (count * product - x_value * y_below - y_value * x_below + one * product_below).sum((1, 2))
        half *= 2
    every = size * (x * y).sum(-1)  # Σ over j < i of (xᵢ − xⱼ)(yᵢ − yⱼ), entries being centred
    products: Values = 2 * (2 * rising - every)
    return products


# --- the figure: drawn vectors ---


def _permuted(rows: Values, draws: Draws) -> Values:
    return rows[:, draws.permutation(rows.shape[1])]


def _rotated(rows: Values, draws: Draws) -> Values:
    """Rows [n, width], n ≤ width and of full rank, times a uniformly random orthogonal matrix, which is never made.

    rows = triangle · frame, n orthonormal rows. A random rotation turns the frame into a uniformly random one, and that
    is what normal vectors give when their own triangle is divided out (Mezzadri, arXiv math-ph/0609050). O(n²·width),
    exact in law; for a single vector it is a random linear projection to the same width that keeps its length.
    """
    normal = draws.standard_normal(rows.shape)
    triangle, divided = (np.linalg.cholesky(vectors @ vectors.T) for vectors in (rows, normal))
    rotated: Values = triangle @ np.linalg.solve(divided, normal)
    return rotated


def _scaled(rows: Values, draws: Draws) -> Values:
    """Every feature times a factor of its own. The papers do not give the factors' law: here uniform in (0, 1)."""
    scaled: Values = rows * draws.uniform(size=rows.shape[1])
    return scaled


def _projected(rows: Values, draws: Draws) -> Values:
    """To one dimension: the right side of the bound in STIP §5.3."""
    projected: Values = rows @ draws.standard_normal((rows.shape[1], 1))
    return projected


def _unrelated(rows: Values, draws: Draws) -> Values:
    return draws.standard_normal(rows.shape)


TRANSFORMATIONS: dict[str, Callable[[Values, Draws], Values]] = {
    "permutation": _permuted,
    "rotation": _rotated,
    "random scaling": _scaled,
    "random projection": _projected,
    "nothing in common": _unrelated,
}


def by_width(widths: tuple[int, ...], draws: Draws) -> dict[str, Any]:
    """Medians over normal rows and their transformed copies: the entries of a vector as samples, then its tokens."""
    entries: dict[str, dict[str, list[float]]] = {"szekely": {}, "printed": {}}
    tokens: dict[str, dict[str, list[float]]] = {"szekely": {}, "corrected": {}}
    for width in widths:
        samples = [draws.standard_normal((TOKENS, width)) for _ in range(REPEATS)]
        distances = [_distances(rows) for rows in samples]
        for name, transform in TRANSFORMATIONS.items():
            copies = [transform(rows, draws) for rows in samples]
            if name != "random projection":  # it leaves one entry, which has no partner
                _append(entries, name, _compare_entries([rows[:VECTORS] for rows in samples], copies))
            _append(tokens, name, _compare_tokens(distances, [_distances(copy) for copy in copies]))
    shared = {"widths": list(widths), "repeats": REPEATS}
    return {
        "entries": {**shared, "vectors": VECTORS, **entries},
        "tokens": {**shared, "tokens": TOKENS, **tokens},
    }


def _append(curves: dict[str, dict[str, list[float]]], name: str, values: dict[str, float]) -> None:
    for statistic, value in values.items():
        curves[statistic].setdefault(name, []).append(value)


def _compare_entries(samples: Sequence[Values], copies: Sequence[Values]) -> dict[str, float]:
    """Medians over all vectors of samples [vectors, width] against the first of their copies, entry by entry."""
    pairs = [(sample, copy[: len(sample)]) for sample, copy in zip(samples, copies, strict=True)]
    return {
        "szekely": float(np.median([entrywise(*pair) for pair in pairs])),
        "printed": float(np.median([paper_distance(*pair) for pair in pairs])),
    }


def _compare_tokens(samples: Sequence[Values], copies: Sequence[Values]) -> dict[str, float]:
    """Medians over samples and their copies, token by token, from distances between tokens [tokens, tokens]."""
    pairs = list(zip(samples, copies, strict=True))
    return {
        "szekely": float(np.median([_of_centred(_doubly_centred(x), _doubly_centred(y)) for x, y in pairs])),
        "corrected": float(np.median([_of_centred(_u_centred(x), _u_centred(y)) for x, y in pairs])),
    }


# --- the export ---


def _traffic(scene: Scene) -> dict[str, Any]:
    """Embeddings of the first different tokens of the victim's text against what travels for them."""
    _, first = np.unique(scene.text.secret, return_index=True)
    ids = scene.text.secret[np.sort(first)][:TOKENS]
    plain, sent = scene.tokens.embed(ids), scene.sent(ids)
    return {
        "tokens": len(ids),
        "width": plain.shape[1],
        "by_entries": _compare_entries([plain], [sent]),
        "by_tokens": _compare_tokens([_distances(plain)], [_distances(sent)]),
    }


def _parameters(scene: Scene, base: Weights, draws: Draws) -> Iterator[dict[str, Any]]:
    """Rows of the public weights against the rows at the same places of the cloud's, and against their own shuffle."""
    for name in _sample(scene, base):
        known, held = (_some_rows(weights, name, draws_of=len(name)) for weights in (base, scene.target.weights))
        yield {
            "name": name,
            "rows": len(known),
            "width": known.shape[1],
            **_compare_entries([known], [held]),
            "shuffled": _compare_entries([known], [draws.permuted(known, axis=1)])["szekely"],
        }


def _sample(scene: Scene, base: Weights) -> list[str]:
    """Parameters of the middle layer and those outside layers, that both sides have in the same shape."""
    middle = scene.target.weights.config.get_text_config().num_hidden_layers // 2

    def wanted(name: str, shape: tuple[int, ...]) -> bool:
        if isinstance(scene.family.axes(name), OnDevice):  # zeros on both sides
            return False
        layer = re.search(r"\.(\d+)\.", name)
        small = int(np.prod(shape)) <= MOST_VALUES
        return small and base.shapes.get(name) == shape and (layer is None or int(layer[1]) == middle)

    names = [name for name, shape in sorted(scene.target.weights.shapes.items()) if wanted(name, shape)]
    return names[:: -(-len(names) // MOST_PARAMETERS) or 1]


def _some_rows(weights: Weights, name: str, draws_of: int) -> Values:
    """The same rows [rows, width] of a parameter, whoever's weights these are."""
    values = weights.read(name)
    rows = values.reshape(-1, values.shape[-1])
    chosen = np.random.default_rng(draws_of).permutation(len(rows))[:ROWS]
    some: Values = rows[np.sort(chosen)].numpy()
    return some
