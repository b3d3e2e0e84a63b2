"""What traffic gives away to someone without the model: a substitution cipher, and a tied classifier.

No scheme that hides every token in the same secret basis does better at the first.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment, quadratic_assignment
from scipy.sparse import coo_array, csr_array, diags_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from export.audit.attack import (
    Attack,
    Outcome,
    needs,
    needs_base,
    needs_cloud_head,
    needs_next_tokens,
    needs_text,
)
from export.audit.positions import without_positions
from export.audit.scene import Scene
from shared.key import Index
from shared.wire import Array

Real = npt.NDArray[np.float32]

# --- Equal tokens are equal vectors: a substitution cipher ---

EQUAL = 1e-4  # a difference of two vectors that is no more than rounding, as a share of their lengths
SENT = (1_000, 3_000, 10_000, 30_000)  # tokens after which the attack is measured, and after all there are
STARTS = (50, 200)  # tokens that open an attempt: few are surer, more carry further; the better attempt counts
OFFSETS = (1, 2, 3, 4)  # how far neighbours count
GROWTH = 1.5  # of the set of tokens under consideration, a round
SETTLING = 3  # rounds after all are in
FREQUENCY_WEIGHT = 0.3  # of the difference of log-frequencies, beside the similarity of neighbours


def sequence_of(scene: Scene) -> Index:
    """The secret text as the cloud sees it: a number [tokens] for each token, the same for the same token."""
    return labels(traffic_of(scene), _near(scene))


def traffic_of(scene: Scene) -> Array:
    """The vectors [tokens, hidden] of the secret text, and where positions were added, as if all stood at one place."""
    sent = scene.sent(scene.text.secret)
    if scene.tokens.positions is None:
        return sent
    return without_positions(sent, scene.tokens.places(len(sent)), _near(scene))


def _near(scene: Scene) -> float:
    """What rounding leaves of the difference of equal tokens: where positions cancel, as much as of entries."""
    rounding = 0.0 if scene.tokens.positions is None else float(torch.finfo(scene.target.dtype).eps) / 2
    return max(EQUAL, rounding)


def labels(vectors: Array, near: float = EQUAL) -> Index:
    """A number [n] for every vector [n, hidden], the same for the same token.

    Equal up to rounding, as a product with a matrix rounds by its place in the batch. near: a difference that is no
    more than rounding, as a share of lengths.
    """
    looks = np.asarray(vectors, np.float32) @ np.random.default_rng(0).standard_normal(
        (vectors.shape[1], 8), np.float32
    )
    distinct, inverse = np.unique(looks, axis=0, return_inverse=True)
    near *= float(np.median(np.linalg.norm(distinct, axis=1)))
    pairs = cKDTree(distinct).query_pairs(near, output_type="ndarray")
    same = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(distinct),) * 2)
    groups = connected_components(same, directed=False)[1].astype(np.int64)
    labelled: Index = groups[inverse.reshape(-1)]
    return labelled


def neighbours(sequence: Index, size: int) -> list[csr_array]:
    """How often b stands d places after a, and before it, for each of OFFSETS: tables [size, size]."""
    tables = []
    for offset in OFFSETS:
        ones = np.ones(max(0, sequence.size - offset), np.float32)
        after = coo_array((ones, (sequence[:-offset], sequence[offset:])), shape=(size, size)).tocsr()
        tables += [after, after.T.tocsr()]
    return tables


def match_profiles(seen: list[csr_array], known: list[csr_array], labelled: Index, tokens: Index) -> Real:
    """How alike the neighbours of every label and every token are [labels, tokens], given that `labelled` are `tokens`.

    Cosine of the square roots of counts (Bhattacharyya), added up over distances and sides.
    """
    alike = np.zeros((seen[0].shape[0], known[0].shape[0]), np.float32)
    for mine, theirs in zip(seen, known, strict=True):
        alike += (_unit_rows(mine[:, labelled]) @ _unit_rows(theirs[:, tokens]).T).toarray()
    return alike


def _unit_rows(counts: csr_array) -> csr_array:
    rooted = counts.sqrt()
    lengths = np.sqrt(np.asarray(counts.sum(axis=1)).reshape(-1))
    scaled: csr_array = (diags_array(1 / np.maximum(lengths, 1e-9).astype(np.float32)) @ rooted).tocsr()
    return scaled


def read_cipher(sequence: Index, public: Index) -> Index:
    """The token [labels] that each label of a `sequence` most likely is, from a `public` text of ids; -1 for none.

    Frequency ranks first; bigrams of the most frequent then put them right (quadratic assignment, Vogelstein et al.
    2015); from there the matched set grows, each round assigning every label anew by the neighbours it shares.
    """
    tokens, text = np.unique(public, return_inverse=True)
    size = int(sequence.max()) + 1
    seen, known = neighbours(sequence, size), neighbours(text, tokens.size)
    found, best = np.full(size, -1), -1.0
    for start in STARTS:
        guess = _grown(sequence, text, seen, known, min(start, size, tokens.size))
        if (agreement := _agreement(seen[0], known[0], guess)) > best:
            found, best = guess, agreement
    return np.where(found >= 0, tokens[found], -1)


def _grown(sequence: Index, text: Index, seen: list[csr_array], known: list[csr_array], start: int) -> Index:
    mine, theirs = np.bincount(sequence) / sequence.size, np.bincount(text) / text.size
    ranked, ranks = np.argsort(-mine, kind="stable"), np.argsort(-theirs, kind="stable")
    unlike = FREQUENCY_WEIGHT * np.abs(np.log(mine)[:, None] - np.log(theirs)[None]).astype(np.float32)
    guess = np.full(mine.size, -1)
    guess[ranked[:start]] = ranks[_by_bigrams(seen[0], known[0], ranked[:start], ranks[:start])]
    considered, settled = float(start), 0
    while settled < SETTLING:
        considered *= GROWTH
        settled += considered >= mine.size
        rows, columns = ranked[: int(considered)], ranks[: int(1.3 * considered)]
        labelled = np.flatnonzero(guess >= 0)
        fit = match_profiles(seen, known, labelled, guess[labelled]) - unlike
        row, column = linear_sum_assignment(fit[np.ix_(rows, columns)], maximize=True)
        guess = np.full(mine.size, -1)
        guess[rows[row]] = columns[column]
    return guess


def _by_bigrams(seen: csr_array, known: csr_array, rows: Index, columns: Index) -> Index:
    """Which column each row is, from the bigrams among them; rows and columns come by frequency."""
    mine, theirs = (np.sqrt(table[pick][:, pick].toarray()) for table, pick in ((seen, rows), (known, columns)))
    distance = np.arange(rows.size)[:, None] - np.arange(rows.size)
    start = 1e-3 + np.exp(-((distance / (3 + rows.size / 20)) ** 2))  # ranks are off by a little
    for _ in range(1_000):
        start /= start.sum(1, keepdims=True)
        start /= start.sum(0, keepdims=True)
    start = (start + 1e-9) / (start + 1e-9).sum(0, keepdims=True)
    result = quadratic_assignment(mine, theirs, method="faq", options={"maximize": True, "P0": start, "maxiter": 100})
    order: Index = result.col_ind
    return order


def _agreement(seen: csr_array, known: csr_array, guess: Index) -> float:
    """How well the bigrams fit under a guess."""
    labelled = np.flatnonzero(guess >= 0)
    mine, theirs = seen[labelled][:, labelled].sqrt(), known[guess[labelled]][:, guess[labelled]].sqrt()
    return float(mine.multiply(theirs).sum())


def read_frequencies(scene: Scene, sizes: tuple[int, ...] = SENT) -> Outcome:
    """Reads the traffic of the secret text, of growing length; the share is that of all of it."""
    secret, public = scene.text.secret, scene.text.public
    sequence = sequence_of(scene)
    sent = [*(size for size in sizes if size < secret.size), secret.size]
    recovered, distinct, named = [], [], []
    for size in sent:
        _, traffic = np.unique(sequence[:size], return_inverse=True)
        right = read_cipher(traffic, public)[traffic] == secret[:size]
        recovered.append(round(float(right.mean()), 4))
        distinct.append(int(np.unique(secret[:size]).size))
        named.append(int(np.unique(secret[:size][right]).size))
    figures = {
        "tokens": sent,
        "recovered": recovered,
        "distinct": distinct,
        "distinct_recovered": named,
        "public_tokens": public.size,
        "in_public_text": round(float(np.isin(secret, public).mean()), 4),  # the others no statistics can name
    }
    return Outcome(recovered[-1], figures)


def _same_statistics(scene: Scene) -> Scene:
    return replace(scene, text=replace(scene.text, public=scene.text.secret))


FREQUENCY = Attack(
    name="traffic-frequency",
    title="Traffic as a substitution cipher",
    knows="the tokenizer and a public text on the same subject; no weights, no table",
    after="tokens of the whole secret text",
    source="frequency analysis (al-Kindi) with other chapters of the same manual, which favours the attacker; "
    "quadratic assignment on bigrams, Vogelstein et al., PLOS ONE 2015",
    run=read_frequencies,
    applies=needs_text,
    # No protection has no bearing on a cipher of labels: the control's statistics are those of the text itself.
    control=lambda scene: read_frequencies(_same_statistics(scene), ()),
)

# --- Some of the text is known ---

KNOWN = (100, 1_000, 10_000)  # tokens: a chat template, a system prompt, a page that the device was made to read


def read_known_text(scene: Scene, *, later: int = KNOWN[-1]) -> Outcome:
    """A dictionary: each known token names its vector, wherever it is sent again. No table, no statistics.

    later: where the text starts that is read.
    """
    secret = scene.text.secret
    later = min(later, secret.size // 2) if later else 0
    sequence = sequence_of(scene)
    recovered = []
    for count in KNOWN:
        names = np.full(int(sequence.max()) + 1, -1)
        known = slice(0, count if later else secret.size)
        names[sequence[known]] = secret[known]
        recovered.append(round(float((names[sequence[later:]] == secret[later:]).mean()), 4))
    return Outcome(recovered[KNOWN.index(1_000)], {"tokens": list(KNOWN), "recovered": recovered})


KNOWN_TEXT = Attack(
    name="known-text",
    title="A dictionary from text that is known",
    knows="1,000 tokens that some device of the context sent, such as a system prompt; no weights, no table",
    after="all later tokens, of whichever device",
    source="known plaintext, STIP §5.3; needs neither the permutation nor the table",
    run=read_known_text,
    applies=needs_text,
    # In a text that is known as a whole nothing may be missing.
    control=lambda scene: read_known_text(scene, later=0),
)

# --- A tied classifier is the table of inputs ---

SCORED = 1_000
PAIRS = 3  # vectors to solve from, for each feature: enough that some may be matched wrongly
ROUNDS = 5


def nearest_rows(vectors: Array, rows: Array) -> tuple[Index, npt.NDArray[np.bool_]]:
    """For vectors [n, hidden] the nearest of rows [vocab, hidden] by cosine, and whether both agree."""
    mine, theirs = _directions(vectors), _directions(rows)
    alike = mine @ theirs.T  # [n, vocab]
    nearest: Index = alike.argmax(axis=1)
    return nearest, alike[:, nearest].argmax(axis=0) == np.arange(len(vectors))


def _directions(rows: Array) -> Real:
    unit: Real = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).astype(np.float32)
    return unit


def undo_gain(vectors: Array, rows: Array, *, shifted: bool = False) -> Array:
    """Classifier rows [vocab, hidden] in the coordinates of distinct input vectors [n, hidden] of a tied model.

    A scheme that folds the last norm's gain g turns rows e into e·diag(g)·Q beside inputs e·Q. Pairs that are each
    other's nearest give Qᵀ·diag(1/g)·Q by least squares, once there are more of them than features.
    shifted: whether all vectors are off by one and the same vector, which is found along with the rest.
    """
    mended = rows
    known = np.hstack([rows, np.ones((len(rows), 1), rows.dtype)]) if shifted else rows
    for _ in range(ROUNDS):
        nearest, mutual = nearest_rows(vectors, mended)
        if mutual.sum() <= rows.shape[1]:
            break
        pairs = known[nearest[mutual]].astype(np.float64), vectors[mutual].astype(np.float64)
        solved, *_ = np.linalg.lstsq(*pairs, rcond=None)
        before, mended = mended, (known @ solved).astype(np.float32)
        if np.abs(mended - before).max() < 1e-4 * np.abs(mended).max():
            break
    return mended


def distinct_vectors(vectors: Array, near: float = EQUAL) -> Array:
    """One vector [distinct, hidden] for each label of traffic [n, hidden]."""
    _, first = np.unique(labels(vectors, near), return_index=True)
    chosen: Array = vectors[first]
    return chosen


def needs_tied(scene: Scene) -> str | None:
    """For attacks on a classifier that is also the table of inputs."""
    conditions = needs(needs_next_tokens, needs_base, needs_cloud_head)
    return conditions(scene) or (None if scene.tied else "the model is not tied: inputs and classifier differ")


def match_head(scene: Scene) -> Outcome:
    """Names the classifier's row of every vector that travels."""
    rows = scene.target.weights.read(scene.classifier).numpy()
    sent = traffic_of(scene)
    shifted = scene.tokens.positions is not None  # by that of the place where all seem to stand
    if shifted:
        rows, sent = rows - rows.mean(0), sent - sent.mean(0)
    truth = scene.classifier_row[scene.text.secret[:SCORED]]
    nearest, _ = nearest_rows(sent[:SCORED], rows)
    traffic = distinct_vectors(sent, _near(scene))[: PAIRS * rows.shape[1]]
    mended = undo_gain(traffic, rows, shifted=shifted)
    after, _ = nearest_rows(sent[:SCORED], mended)
    exact = np.linalg.norm(mended[after] - sent[:SCORED], axis=1) < 1e-3 * np.linalg.norm(sent[:SCORED], axis=1)
    figures = {
        "matched_before_undoing_gain": round(float((nearest == truth).mean()), 4),
        "rows_equal_to_inputs": round(float(exact.mean()), 4),
        "distinct_vectors_used": len(traffic),
        "follows": "each classifier row is the input vector of its own token: the cloud can feed the model its own "
        "answers, a complete model over a secretly renamed vocabulary (theft-own-table)",
    }
    return Outcome(float((after == truth).mean()), figures)


TIED_HEAD = Attack(
    name="tied-head",
    title="Inputs matched to rows of the tied classifier",
    knows="that the model is tied; neither its table nor its weights",
    after="sent tokens matched to their own classifier row: which answers are which prompts' tokens, not their names",
    source="Press and Wolf, arXiv 1608.05859 (tying); the gain undone by least squares is ours",
    run=match_head,
    applies=needs_tied,
)

ATTACKS = (FREQUENCY, KNOWN_TEXT, TIED_HEAD)
