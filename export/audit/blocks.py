"""What quantised weights give away: the features of a block travel side by side, in whatever order.

A stored block shares its scale, so an order of the features moves whole blocks and shuffles inside them, and how long
they are can be read off the file. So each block of a vector that travels is, sorted, a block of some row of the table:
a piece of a vector is enough to name its token. What that adds is told by the same attack without it: as many entries
of which nobody knows that they lie together.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from export.audit.attack import Attack, Outcome, needs, needs_text
from export.audit.look_up import TOKENS, sorted_entries
from export.audit.matching import nearest
from export.audit.scene import Scene
from shared.key import Index
from shared.wire import Array

FEW = 100  # tokens, where an attack takes long
OFF = (0.05, 0.1, 0.2, 0.3, 0.5)  # how far from its row a vector is: noise, in spreads of the embedding table

Match = Callable[[Array, Array, int], Index]


def by_one_block(sent: Array, rows: Array, block: int) -> Index:
    """The row [n] that each vector [n, width] is, of which only the first block was seen."""
    seen = sorted_entries(sent[:, :block])
    found, least = np.zeros(len(seen), np.int64), np.full(len(seen), np.inf)
    for start in range(0, rows.shape[1], block):
        pieces = sorted_entries(rows[:, start : start + block])
        here = nearest(seen, pieces)
        misfit = ((seen - pieces[here]) ** 2).sum(1)
        found, least = np.where(misfit < least, here, found), np.minimum(misfit, least)
    return found


def by_all_blocks(sent: Array, rows: Array, block: int) -> Index:
    """The row of each vector whose blocks, each sorted, are nearest to its own, whichever is which."""
    parts = [torch.from_numpy(sorted_entries(rows[:, at : at + block])) for at in range(0, rows.shape[1], block)]
    half_squares = [pieces.square().sum(1) / 2 for pieces in parts]
    found = np.empty(len(sent), np.int64)
    for at, vector in enumerate(sent):
        seen = torch.from_numpy(sorted_entries(vector.reshape(-1, block)))
        least = torch.full((len(seen), len(rows)), torch.inf)
        for pieces, half_square in zip(parts, half_squares, strict=True):
            torch.minimum(least, half_square - seen @ pieces.T, out=least)
        found[at] = least.sum(0).argmin()
    return found


def by_lengths(sent: Array, rows: Array, block: int) -> Index:
    """The row of each vector, by one number for each block: its length."""
    seen, known = (np.linalg.norm(some.reshape(len(some), -1, block), axis=2) for some in (sent, rows))
    return nearest(sorted_entries(seen), sorted_entries(known))


def by_as_many_entries(sent: Array, rows: Array, block: int) -> Index:
    """The row of each vector, of which only the first entries were seen, as many as a block has, without using that
    they lie together: the row that has most of these values."""
    order = np.argsort(rows, axis=None, kind="stable")
    values, owners = rows.reshape(-1)[order], order // rows.shape[1]
    found = np.empty(len(sent), np.int64)
    for at, seen in enumerate(sent[:, :block]):
        has = np.zeros(len(rows), np.int64)
        bounds = np.searchsorted(values, seen, "left"), np.searchsorted(values, seen, "right")
        for start, end in zip(*bounds, strict=True):
            has[np.unique(owners[start:end])] += 1
        found[at] = has.argmax()
    return found


def by_entries(sent: Array, rows: Array, block: int) -> Index:
    """The row of each vector, by all of its entries without their blocks."""
    return nearest(sorted_entries(sent), sorted_entries(rows))


def _share(scene: Scene, match: Match, tokens: int, *, off: float = 0.0) -> float:
    """Tokens that a way to match names, where what travels is off by noise."""
    ids, target = scene.text.secret[:tokens], scene.target
    sent = scene.sent(ids)
    noise = np.random.default_rng(0).normal(size=sent.shape) * off * scene.table.std()
    sent = (sent + noise).astype(np.float32)

    def at_one_place(here: Index, rows: Array) -> Index:
        return match(sent[here], torch.from_numpy(rows).to(target.dtype).float().numpy(), target.block)

    return float((scene.tokens.look_up(scene.tokens.places(ids.size), at_one_place) == ids).mean())


def _look_up(scene: Scene) -> Outcome:
    figures = {
        "features_in_a_block": scene.target.block,
        "by_all_blocks": _share(scene, by_all_blocks, FEW),
        "by_lengths_of_blocks": _share(scene, by_lengths, TOKENS),
        "by_as_many_entries_without_blocks": _share(scene, by_as_many_entries, FEW),
        "off": OFF,  # as the table of a base is from that of its fine-tune
        "off_by_all_blocks": [_share(scene, by_all_blocks, FEW, off=off) for off in OFF],
        "off_by_all_entries_without_blocks": [_share(scene, by_entries, FEW, off=off) for off in OFF],
        "shows": "a piece of a vector names its token, but it does so without blocks too; they help who has a table "
        "that is a little off, and make the key space smaller, which nobody searches",
    }
    return Outcome(_share(scene, by_one_block, TOKENS), figures)


def _needs_blocks(scene: Scene) -> str | None:
    return None if scene.target.block else "no weights are stored quantised: features move freely, in no blocks"


ATTACKS = (
    Attack(
        name="table-blocks",
        title="Look-up of one block of each vector",
        knows="the embedding table",
        after=f"{TOKENS} tokens of real text, of whose vectors one block is seen",
        source="ours: blocks of quantised weights keep features together",
        run=_look_up,
        control=lambda scene: Outcome(_share(scene, by_one_block, TOKENS)),
        applies=needs(needs_text, _needs_blocks),
    ),
)
