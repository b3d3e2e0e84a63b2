"""What a thief of the model gets: a user who asks for full rows, a cloud that runs or feeds what it holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from export.audit.attack import (
    Attack,
    Outcome,
    needs,
    needs_base,
    needs_cloud_head,
    needs_next_tokens,
    needs_no_positions,
)
from export.audit.predictions import Real, forward, perplexity, windows
from export.audit.scene import Scene, Target, unprotected
from export.audit.traffic import distinct_vectors, labels, nearest_rows, needs_tied, read_cipher, undo_gain
from export.spaces import After
from shared.key import Index, UserKey
from shared.wire import Array

WINDOWS, WINDOW = 4, 128  # of secret text: what predictions and perplexity are measured on


needs_model = needs(needs_next_tokens, needs_base, needs_cloud_head)


# --- A user asks for full rows ---

COLUMNS = 2  # of the classifier that are looked at, for each feature: the others would tell the same
TOP = (256, 1_024)  # the device's own top-k, and the largest that the cloud grants by default


def classifier_space(rows: Real) -> Array:
    """An orthonormal basis [rank, columns] of what full logit rows [n, columns] span; rank is where values drop most.

    Carlini et al., arXiv 2403.06634, §4: logits are hidden states times the classifier, so n > hidden rows span its
    columns, and no more.
    """
    distinct = np.unique(rows, axis=0).astype(np.float64)  # equal rows would leave a value of 0, and the steepest drop
    _, values, basis = np.linalg.svd(distinct, full_matrices=False)
    drop = values[:-1] / np.maximum(values[1:], 1e-12 * values[0])
    drop[values[1:] > 1e-4 * values[0]] = 0  # what is left after the rank is rounding
    kept: Array = basis[: int(drop.argmax()) + 1]
    return kept


def _uncapped(rows: Real, cap: float | None) -> Real:
    """Logits as the classifier gave them, where the model bends them: cap · tanh(logits / cap), as Gemma 2 does."""
    if cap is None:
        return rows
    bent = np.clip(rows.astype(np.float64) / cap, -1 + 1e-7, 1 - 1e-7)
    straight: Real = (cap * np.arctanh(bent)).astype(np.float32)
    return straight


def _complete_block(rows: Real, top: int) -> tuple[Array, int]:
    """The squarest block of rows that top-k answers show whole, from the tokens most often among them, and its rank."""
    seen = np.zeros(rows.shape, bool)
    np.put_along_axis(seen, np.argpartition(-rows, top - 1, axis=1)[:, :top], True, axis=1)
    by_count = np.argsort(-seen.sum(axis=0), kind="stable")[:top]
    whole = np.logical_and.accumulate(seen[:, by_count], axis=1).sum(axis=0)  # rows that show the first m columns
    side = int(np.minimum(whole, np.arange(1, top + 1)).argmax()) + 1
    block = rows[seen[:, by_count[:side]].all(axis=1)][:, by_count[:side]]
    return block, int(np.linalg.matrix_rank(block.astype(np.float64), rtol=1e-6))


def read_classifier(scene: Scene) -> Outcome:
    """The classifier's column space, from full rows that a user with the key asked for and revealed."""
    key, hidden = scene.target.key, scene.target.key.hidden_size
    ids = windows(scene.text.secret, 6, hidden // 4)  # 1.5 × hidden positions
    rows = key.reveal_rows(forward(scene.target.weights.model(), scene.sent(ids))).reshape(ids.size, -1)
    rows = _uncapped(rows, getattr(scene.target.weights.config, "final_logit_softcapping", None))
    vocab = rows.shape[1]
    columns = np.random.default_rng(0).choice(vocab, min(COLUMNS * hidden, vocab), replace=False)
    found = classifier_space(rows[:, columns])
    classifier = _with_bias(scene)[scene.classifier_row[columns]]
    truth, _ = np.linalg.qr(classifier.astype(np.float64))  # [columns, hidden], one more with a bias
    figures: dict[str, Any] = {"rows": ids.size, "rank": len(found), "hidden_size": hidden}
    for top in TOP:
        if top < vocab:
            block, rank = _complete_block(rows, top)
            figures[f"top_{top}"] = {"complete_block": list(block.shape), "rank_in_it": rank} | _counted(
                top, hidden, vocab
            )
    # Mean squared cosine of the principal angles; features found too many count against it.
    return Outcome(float(np.square(found @ truth).sum() / max(len(found), hidden)), figures)


def _counted(top: int, hidden: int, vocab: int) -> dict[str, Any]:
    """Equations against unknowns: each row brings `top` numbers and a hidden state that is not known."""
    if top <= hidden:
        return {"rows_needed": None, "why": f"a row brings {top} numbers and {hidden} unknowns: never enough"}
    return {"rows_needed": -(-hidden * (vocab - hidden) // (top - hidden)), "why": "as many numbers as unknowns"}


def _with_bias(scene: Scene) -> Array:
    """The classifier [vocab, hidden], and beside it the bias of one that has any."""
    weights, bias = scene.target.weights, scene.classifier.removesuffix("weight") + "bias"
    parts = [weights.read(scene.classifier)] + ([weights.read(bias)[:, None]] if bias in weights.shapes else [])
    return torch.cat(parts, 1).numpy()


FULL_LOGITS = Attack(
    name="user-full-logits",
    title="The classifier from full logit rows",
    knows="a device bundle: key and table; asks for full rows (top_k 0), 1.5 for each feature",
    after="the classifier's column space: it is known up to an invertible matrix, and the hidden size is",
    source="Carlini et al., Stealing Part of a Production Language Model, arXiv 2403.06634, §4",
    run=read_classifier,
    applies=needs_model,
)

# --- The stolen model, run as it is ---

ANSWER = 16  # tokens


def enter(scene: Scene, ids: Index) -> Array:
    """What a thief without the key feeds the stolen model: plain embeddings [sequences, tokens, hidden]."""
    return scene.tokens.embed(ids)


@torch.inference_mode()
def _continued(model: Any, scene: Scene) -> str:
    """A greedy answer to the prompt, ids taken for plain."""
    ids = scene.text.prompt
    for _ in range(ANSWER):
        inputs = torch.from_numpy(np.ascontiguousarray(enter(scene, ids[None])))
        ids = np.append(ids, model(inputs_embeds=inputs, logits_to_keep=1).logits[0, -1].argmax(-1).numpy())
    return scene.text.decode(ids)


def run_stolen(scene: Scene) -> Outcome:
    """The stolen model on plain text, beside the original."""
    ids = windows(scene.text.secret, WINDOWS, WINDOW)
    figures: dict[str, Any] = {}
    predicted = []
    for name in ("original", "stolen"):
        model = scene.public.model() if name == "original" else scene.target.weights.model()
        logits = forward(model, scene.tokens.embed(ids) if name == "original" else enter(scene, ids))
        figures |= {f"perplexity_{name}": round(perplexity(logits, ids), 2), f"text_{name}": _continued(model, scene)}
        predicted.append(logits.argmax(-1))
        del model, logits
    return Outcome(float((predicted[0] == predicted[1]).mean()), figures)


def _plain(scene: Scene) -> Target:
    """A victim that serves the public weights as they are."""
    vocab, hidden = scene.table.shape
    key = UserKey("plain", np.arange(hidden), np.arange(vocab))
    return Target("none", "cloud", scene.public, torch.float32, key, scene.tokens)


UNAUTHORIZED = Attack(
    name="unauthorized-use",
    title="The stolen model on plain embeddings (two lines on: a better thief)",
    knows="the tokenizer and the public table; tries nothing clever, as in the paper",
    after="next tokens that the original would choose",
    source="STIP (NDSS 2026), table 4",
    run=run_stolen,
    # Feeding plain embeddings is all there is to it, so the control serves plain weights.
    control=lambda scene: run_stolen(scene.with_target(_plain(scene))),
    applies=needs_model,
)

# --- The stolen model, fed with its own classifier ---


def own_table(scene: Scene) -> Array:
    """Input vectors [vocab, hidden] for a stolen tied model: its classifier's rows, the gain undone by some traffic."""
    rows = scene.target.weights.read(scene.classifier).numpy()
    return undo_gain(_traffic(scene)[: 3 * rows.shape[1]], rows)


def _traffic(scene: Scene) -> Array:
    return distinct_vectors(scene.sent(scene.text.secret))


def run_on_own_table(scene: Scene) -> Outcome:
    """The stolen model in its own, renamed vocabulary: nothing but names should be missing."""
    ids = windows(scene.text.secret, WINDOWS, WINDOW)
    logits = forward(scene.public.model(), scene.tokens.embed(ids))  # the original is gone before the stolen one comes
    expected, original = logits.argmax(-1), perplexity(logits, ids)
    del logits
    renamed = scene.classifier_row
    model = scene.target.weights.model()
    table, rows = own_table(scene), scene.target.weights.read(scene.classifier).numpy()
    untouched = forward(model, rows[renamed[ids]])
    logits = forward(model, table[renamed[ids]])
    share = float((logits.argmax(-1) == renamed[expected]).mean())
    names = name_rows(scene, table)  # the token that each row is thought to be
    writes = np.zeros(len(table), np.int64)  # the row that the thief writes for a token
    writes[names[names >= 0]] = np.flatnonzero(names >= 0)
    spoken = names[forward(model, table[writes[ids]]).argmax(-1)]
    figures = {
        "perplexity_original": round(original, 2),
        "perplexity_stolen_in_renamed_ids": round(perplexity(logits, renamed[ids]), 2),
        "perplexity_if_gain_is_left": round(perplexity(untouched, renamed[ids]), 2),
        "text_named_by_traffic": round(float((names[renamed[ids]] == ids).mean()), 4),
        "same_in_plain_names": round(float((spoken == expected).mean()), 4),
    }
    return Outcome(share, figures)


def name_rows(scene: Scene, table: Array) -> Index:
    """The token of each row [vocab] as traffic read as a cipher names it; -1 for none (see traffic-frequency)."""
    vectors = scene.sent(scene.text.secret)
    _, first, sequence = np.unique(labels(vectors), return_index=True, return_inverse=True)
    row, _ = nearest_rows(vectors[first], table)
    names = np.full(len(table), -1)
    names[row] = read_cipher(sequence, scene.text.public)
    return names


OWN_TABLE = Attack(
    name="theft-own-table",
    title="The stolen model fed with its own classifier",
    knows="that the model is tied, and its traffic; for plain names the tokenizer and a public text",
    after="next tokens that the original would choose, in secretly renamed ids (figures: in plain names too)",
    source="ours; follows from tying (Press and Wolf, arXiv 1608.05859)",
    run=run_on_own_table,
    applies=needs(needs_next_tokens, needs_no_positions, needs_tied),
)

# --- No classifier in the cloud ---

PREDICTED = 4_096  # positions that a cloud learns a missing gain from: what it returned, and what was sent next


def classify_by_traffic(hidden: Array, vectors: Array) -> Array:
    """Scores [n, distinct] of tokens by inner products of hidden states with the vectors that travelled for them."""
    scores: Array = hidden @ vectors.T
    return scores


def run_without_classifier(scene: Scene) -> Outcome:
    """A tied classifier that stays on the device is the table all the same: vectors that travel are its rows.

    A gain that was folded into it is missing; the answers that follow hidden states teach a map in its place.
    """
    secret = scene.text.secret
    _, first, sequence = np.unique(labels(scene.sent(secret)), return_index=True, return_inverse=True)
    vectors, tokens = scene.sent(secret[first]), secret[first]
    lessons = windows(np.arange(secret.size), PREDICTED // WINDOW, WINDOW)
    states = _last_states(scene, secret[lessons])[:, :-1].reshape(-1, vectors.shape[1])
    following = sequence[lessons[:, 1:].reshape(-1)]
    half = len(states) // 2
    learnt = _ridge(states[:half], vectors[following[:half]])
    maps = {"as it is": np.eye(vectors.shape[1], dtype=np.float32), "learnt": learnt}
    fits = {
        name: float((classify_by_traffic(states[half:] @ one, vectors).argmax(1) == following[half:]).mean())
        for name, one in maps.items()
    }
    chosen = max(fits, key=lambda name: fits[name]) if _gain_is_missing(scene) else "as it is"
    exam = windows(secret, WINDOWS, WINDOW)
    logits = forward(scene.public.model(), scene.tokens.embed(exam))
    expected = tokens[logits[..., tokens].argmax(-1)]
    seen = _last_states(scene, exam).reshape(-1, vectors.shape[1]) @ maps[chosen]
    named = tokens[classify_by_traffic(seen, vectors).argmax(1)].reshape(exam.shape)
    figures = {"map": chosen, "next_vector_guessed": fits[chosen], "distinct_tokens_seen": len(tokens)}
    return Outcome(float((named == expected).mean()), figures)


def _gain_is_missing(scene: Scene) -> bool:
    """Whether the cloud's last norm has ones where its gain should be: who folded it put it into the classifier."""
    axes = scene.family.axes(scene.classifier)
    gains = [axis.gain for axis in axes if isinstance(axis, After)] if isinstance(axes, tuple) else []
    return all(bool((scene.target.weights.read(name) == 1).all()) for name in gains)


@torch.inference_mode()
def _last_states(scene: Scene, ids: Index) -> Real:
    """What the cloud returns for token ids [sequences, positions]: [sequences, positions, hidden]."""
    body = scene.target.weights.model().get_decoder()
    inputs = scene.sent(ids)
    rows = [body(inputs_embeds=torch.from_numpy(one[None]), use_cache=False).last_hidden_state[0] for one in inputs]
    states: Real = torch.stack(rows).numpy()
    return states


def _ridge(inputs: Real, outputs: Array) -> Real:
    """The linear map of least squares, with a tenth of the inputs' mean square against overfitting."""
    squares = inputs.T @ inputs
    squares += 0.1 * np.trace(squares) / len(squares) * np.eye(len(squares), dtype=np.float32)
    solved: Real = np.linalg.solve(squares, inputs.T @ outputs)
    return solved


def _needs_device_head(scene: Scene) -> str | None:
    return None if scene.target.head == "device" else "the cloud has the classifier itself"


NO_CLASSIFIER = Attack(
    name="classifier-from-traffic",
    title="Answers without a classifier, scored by traffic",
    knows="that the model is tied; hidden states and the vectors that travel",
    after="next tokens that the original would choose among those seen: which vectors they are, not their names",
    source="ours; follows from tying (Press and Wolf, arXiv 1608.05859)",
    run=run_without_classifier,
    control=lambda scene: run_without_classifier(scene.with_target(unprotected(scene, folds=False))),
    applies=needs(needs_next_tokens, needs_no_positions, needs_base, _needs_device_head),
)

ATTACKS = (FULL_LOGITS, UNAUTHORIZED, OWN_TABLE, NO_CLASSIFIER)
