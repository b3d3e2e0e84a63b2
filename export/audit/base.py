"""Attacks by who has the public base model: its weights, all of them, against the transformed ones."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from export.audit.attack import Attack, Outcome, needs, needs_base, needs_text
from export.audit.look_up import TOKENS, norms, sorted_entries
from export.audit.matching import nearest, nearest_number, procrustes, turn
from export.audit.scene import Scene, Weights, unprotected
from export.spaces import After, Axis, Gated, spaces_of
from shared.wire import Array

STRENGTHS = (0.0, 0.1, 0.3, 0.5)  # of a perturbation, as a share of each tensor's own spread
FAR = 0.1  # the strength that counts
PAIRS = 2048  # rows that an alignment is refined on
ROUNDS = 6


@dataclass(frozen=True, eq=False)
class Pair:
    """Rows of one tensor that reads or writes the residual stream: public, and as the cloud has them. [rows, hidden]"""

    tensor: str
    public: Array
    hidden: Array


INNER = ("gate", "ffn")  # features of feed-forward blocks as the activation takes them: reordered, never scaled
UP = ("up",)  # what a gate is multiplied with: reordered, and perhaps scaled


def reading_rows(scene: Scene, features: tuple[str, ...] = INNER, stream: str | None = None) -> list[Pair]:
    """The weights [features, hidden] that read a stream, layer by layer, as functions of the normalised stream: by
    default that of prompts.

    A scheme may fold a norm's gain into what reads it or leave it in the norm: with the gain folded on both sides the
    comparison is the same. The cloud holds its own gains, so it can. Experts change places: a layer's are one matrix.
    """
    stream = stream or scene.text_stream
    pairs = []
    for name in scene.target.weights.shapes:
        axes = scene.family.axes(name)
        if isinstance(axes, tuple) and _reads(axes, features, stream, scene.may_turn):
            public, hidden = (_rows(weights, name, axes, features) for weights in (scene.public, scene.target.weights))
            pairs.append(Pair(name, public, hidden))
    return pairs


def _reads(axes: tuple[Axis, ...], features: tuple[str, ...], stream: str, may_turn: set[str]) -> bool:
    """Whether a tensor reads the stream into such features. Where norms come first, what reads does so through one."""
    if len(axes) < 2:
        return False
    inner, reads, _ = _turned_round(axes)
    through = isinstance(reads, After) or stream not in may_turn
    return through and spaces_of(reads) == (stream,) and any(_kind(space) in features for space in spaces_of(inner))


def _turned_round(axes: tuple[Axis, ...]) -> tuple[Axis, Axis, bool]:
    """The axis of inner features, the one that reads, and whether they stand the other way round, as in Conv1D."""
    first, second = axes[-2:]
    return (second, first, True) if isinstance(first, After) else (first, second, False)


def _kind(space: str) -> str:
    return space.split("[")[0].rpartition(".")[2]


def _rows(weights: Weights, name: str, axes: tuple[Axis, ...], features: tuple[str, ...]) -> Array:
    """The rows [features, hidden] of a tensor, of all experts where it is a stack."""
    inner, reads, columns = _turned_round(axes)
    tensor = weights.read(name)
    tensor = tensor.mT if columns else tensor
    if isinstance(reads, After):
        tensor = tensor * (weights.read(reads.gain) + reads.offset)
    kinds = [_kind(space) for space in spaces_of(inner)]
    [part] = [block for kind, block in zip(kinds, tensor.tensor_split(len(kinds), -2), strict=True) if kind in features]
    rows: Array = part.reshape(-1, part.shape[-1]).numpy()
    return rows


# --- alignments: from pairs of tensors to the map from the public basis to the cloud's ---


def by_sorted_entries(pairs: list[Pair]) -> Array:
    """Rows are the same up to the order of entries: match them by sorted entries, then columns by matched rows."""
    public, hidden = [], []
    for pair in pairs[:4]:
        match = nearest(sorted_entries(pair.hidden), sorted_entries(pair.public))
        public.append(pair.public[match])
        hidden.append(pair.hidden)
    return _permutation(np.concatenate(public), np.concatenate(hidden))


def _permutation(public: Array, hidden: Array) -> Array:
    """The permutation matrix Q that brings public·Q nearest to `hidden`."""
    columns = nearest(hidden.T, public.T)
    basis = np.zeros((len(columns),) * 2, np.float32)
    basis[columns, np.arange(len(columns))] = 1
    return basis


def by_norms(pairs: list[Pair]) -> Array:
    """Rows keep their norms: match them by these, solve one Procrustes problem over all, and refine."""
    matched = [pair.public[nearest_number(norms(pair.hidden)[:, 0], norms(pair.public)[:, 0])] for pair in pairs]
    start = procrustes(np.concatenate(matched), np.concatenate([pair.hidden for pair in pairs]))
    return refine(pairs, start)


def by_moments(pairs: list[Pair]) -> Array:
    """No row is matched at first: second moments WᵀW turn with the basis, so their eigenvectors do, up to signs.

    The signs follow from single layers' moments: in the common eigenbasis, entry (i, j) carries sign i times sign j,
    and the leading eigenvector of all those products, scaled to unit row sums, has the signs (arXiv 0905.3174): all of
    them or all of them turned round, which the rows tell apart.
    """
    public = [_moments(pair.public) for pair in pairs]
    hidden = [_moments(pair.hidden) for pair in pairs]
    vectors, turned = (torch.linalg.eigh(torch.stack(moments).sum(0))[1] for moments in (public, hidden))
    agreement = torch.zeros_like(vectors)
    for one, other in zip(public, hidden, strict=True):
        agreement += (vectors.T @ one @ vectors) * (turned.T @ other @ turned)
    agreement.fill_diagonal_(0)
    scale = agreement.abs().sum(1).rsqrt()
    signs = torch.linalg.eigh(scale[:, None] * agreement * scale)[1][:, -1].sign()
    basis = ((vectors * signs) @ turned.T).float().numpy()
    return refine(pairs, min(basis, -basis, key=lambda one: misfit(pairs, one)))


def _moments(rows: Array) -> torch.Tensor:
    wide = torch.from_numpy(rows).double()
    return wide.T @ wide


def refine(pairs: list[Pair], basis: Array) -> Array:
    """Matches rows with the basis found so far, solves for a better one, and again."""
    step = max(1, sum(len(pair.public) for pair in pairs) // PAIRS)
    for _ in range(ROUNDS):
        public, hidden = [], []
        for pair in pairs:
            asked = pair.hidden[::step]
            public.append(pair.public[nearest(turn(asked, basis), pair.public)])
            hidden.append(asked)
        better = procrustes(np.concatenate(public), np.concatenate(hidden))
        if np.abs(better - basis).max() < 1e-4:
            return better
        basis = better
    return basis


def misfit(pairs: list[Pair], basis: Array) -> float:
    """How far rows are from the nearest public row, as a share of their length: what tells an attacker that it won."""
    pair = pairs[0]
    turned = turn(pair.hidden, basis)
    gap = np.linalg.norm(turned - pair.public[nearest(turned, pair.public)], axis=1)
    return float(np.median(gap / np.linalg.norm(turned, axis=1)))


def match_features(hidden: Array, public: Array) -> tuple[Array, Array]:
    """For each row of `hidden` the public row of most nearly the same direction, and the scale between the two.

    Scaling and reordering rows leave directions alone: what Game of Arrows (USENIX Security 2025) matches weights by.
    """
    directions = public / np.linalg.norm(public, axis=1, keepdims=True)
    asked = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    both = np.concatenate([directions, -directions])  # a scale may be negative
    match = nearest(asked, both) % len(public)
    return match, (hidden * public[match]).sum(1) / (public[match] ** 2).sum(1)


# --- the attacks ---

Align = Callable[[list[Pair]], Array]


def _tokens(scene: Scene, basis: Array) -> float:
    """Share of real text that the basis reads."""
    ids = scene.text.secret[:TOKENS]
    plain = turn(scene.sent(ids), basis)
    found = scene.tokens.look_up(scene.tokens.places(ids.size), lambda here, rows: nearest(plain[here], rows))
    return float((found == ids).mean())


def _read_with(align: str) -> Callable[[Scene], Outcome]:
    def run(scene: Scene) -> Outcome:
        pairs = reading_rows(scene)
        basis = ALIGNMENTS[align](pairs)
        return Outcome(_tokens(scene, basis), {"misfit": misfit(pairs, basis)})

    return run


ALIGNMENTS: dict[str, Align] = {
    "sorted entries": lambda pairs: by_sorted_entries(pairs),  # looked up when called: tests break them
    "norms": lambda pairs: by_norms(pairs),
    "moments": lambda pairs: by_moments(pairs),
}


def _arrows(scene: Scene) -> Outcome:
    """Rebuilds the scaled and reordered rows of the feed-forward blocks in the public basis."""
    gates, ups = reading_rows(scene), reading_rows(scene, UP)
    basis = by_norms(gates)
    right = rebuilt = rows = 0
    for gate, up in zip(gates, ups, strict=True):
        turned = turn(up.hidden, basis)
        match, scale = match_features(turned, up.public)
        truth = nearest(turn(gate.hidden, basis), gate.public)  # gate rows are not scaled, and share the order
        plain = turned / scale[:, None]
        error = np.linalg.norm(plain - up.public[truth], axis=1) / np.linalg.norm(up.public[truth], axis=1)
        right += int((match == truth).sum())
        rebuilt += int((error < 0.02).sum())
        rows += len(match)
    return Outcome(rebuilt / rows, {"matched": right / rows})


def spectrum(rows: Array) -> Array:
    """Singular values, which orthogonal maps on either side leave alone."""
    squares: Array = torch.linalg.eigvalsh(_moments(rows)).clamp_min(0).numpy()
    return np.sqrt(squares)


def _fingerprint(scene: Scene) -> Outcome:
    """Which layer of which public model is this? Told by singular values, with no map found at all."""
    pairs = reading_rows(scene)
    hidden, public = ([spectrum(getattr(pair, side)) for pair in pairs] for side in ("hidden", "public"))
    found = nearest(np.stack(hidden), np.stack(public))
    return Outcome(float((found == np.arange(len(pairs))).mean()), {"layers": len(pairs)})


def fine_tuned(scene: Scene, strength: float) -> Scene:
    """The attacker has a base that the victim was fine-tuned from: every matrix is off by noise of `strength`, as a
    share of its own spread. (Which of the two was perturbed makes no difference to an attack.)"""
    base, embedding = scene.public, scene.embedding

    def read(name: str) -> torch.Tensor:
        values = base.read(name)
        if values.ndim < 2 or not strength:
            return values
        tied = scene.tied and name == scene.family.classifier
        generator = torch.Generator().manual_seed(zlib.crc32((embedding if tied else name).encode()))
        return values + strength * values.std() * torch.randn(values.shape, generator=generator)

    table = read(embedding).numpy() * np.float32(scene.tokens.scale)
    return replace(scene, base=replace(base, read=read), tokens=replace(scene.tokens, table=table))


def _fine_tuned(scene: Scene, strengths: tuple[float, ...]) -> Outcome:
    """The attacks above on ever more distant bases. The attacker keeps whichever alignment fits best."""
    curves: dict[str, list[float]] = {name: [] for name in ALIGNMENTS}
    best = []
    for strength in strengths:
        near = fine_tuned(scene, strength)
        pairs = reading_rows(near)
        fits = []
        for name, align in ALIGNMENTS.items():
            basis = align(pairs)
            curves[name].append(_tokens(near, basis))
            fits.append((misfit(pairs, basis), curves[name][-1]))
        best.append(min(fits)[1])
    figures = {"strengths": list(strengths), "recovered": best, "curves": curves}
    return Outcome(best[strengths.index(FAR)], figures)


def _needs_gates(scene: Scene) -> str | None:
    gated = any(isinstance(one, Gated) for one in scene.family.spaces(scene.target.weights.config))
    return None if gated else "its feed-forward blocks have no gates, so that nothing of them is scaled: see base-norms"


_TOKENS_READ = f"{TOKENS} tokens of real text"
ATTACKS = (
    Attack(
        name="base-sorted-entries",
        title="Rows of weights by sorted entries",
        knows="the public base model",
        after=_TOKENS_READ,
        source="STIP §5.3 calls columns matched by known values; here nothing but the weights is known",
        run=_read_with("sorted entries"),
        applies=needs(needs_text, needs_base),
    ),
    Attack(
        name="base-norms",
        title="Rows of weights by norm, then Procrustes",
        knows="the public base model",
        after=_TOKENS_READ,
        source="orthogonal Procrustes (Schönemann 1966), refined like iterative closest points",
        run=_read_with("norms"),
        applies=needs(needs_text, needs_base),
    ),
    Attack(
        name="base-moments",
        title="Eigenvectors of second moments, no row matched",
        knows="the public base model",
        after=_TOKENS_READ,
        source="spectral alignment with sign synchronisation",
        run=_read_with("moments"),
        applies=needs(needs_text, needs_base),
    ),
    Attack(
        name="base-arrows",
        title="Weights put back in public coordinates",
        knows="the public base model",
        after="rows of all feed-forward up projections, rebuilt within 2 %",
        source="Game of Arrows (USENIX Security 2025)",
        run=_arrows,
        applies=needs(_needs_gates, needs_base),
    ),
    Attack(
        name="base-singular-values",
        title="Layers told by singular values",
        knows="the public base model",
        after="layers recognised",
        source="singular values survive orthogonal maps on both sides",
        run=_fingerprint,
        applies=needs_base,
    ),
    Attack(
        name="base-fine-tuned",
        title="The same, the victim being a fine-tune",
        knows="the public base of a fine-tuned model, 10 % off",
        after=_TOKENS_READ,
        source="the three alignments above on perturbed bases",
        run=lambda scene: _fine_tuned(scene, STRENGTHS),
        control=lambda scene: _fine_tuned(scene.with_target(unprotected(scene)), (FAR,)),
        applies=needs(needs_text, needs_base),
    ),
)
