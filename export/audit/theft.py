"""What a thief of the model gets: a user who asks for full rows, a cloud that runs, feeds or trains what it holds."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from export.audit.attack import Attack, Outcome, needs_base, needs_cloud_head
from export.audit.corpus import Text
from export.audit.scene import Scene, Target, Weights, unprotected
from export.audit.traffic import distinct_vectors, labels, nearest_rows, needs_tied, read_cipher, undo_gain
from export.spaces import After, Dropped
from shared.key import Index, UserKey
from shared.wire import Array

Real = npt.NDArray[np.float32]

WINDOWS, WINDOW = 4, 128  # of secret text: what predictions and perplexity are measured on


def windows(ids: Index, count: int, length: int) -> Index:
    """Pieces [count, length] of a text, evenly spread, that do not overlap where it is long enough."""
    starts = np.linspace(0, max(0, ids.size - length), count).astype(np.int64)
    return np.stack([np.resize(ids[start : start + length], length) for start in starts])


@torch.inference_mode()
def forward(model: Any, inputs: Array) -> Real:
    """Logits [sequences, positions, vocab] of a stock model for inputs [sequences, positions, hidden]."""
    rows = [model(inputs_embeds=torch.from_numpy(one[None]), use_cache=False).logits.numpy()[0] for one in inputs]
    return np.stack(rows)


def perplexity(logits: Real, ids: Index) -> float:
    """Of ids [sequences, positions] under the logits [sequences, positions, vocab] before each."""
    scores = torch.from_numpy(logits[:, :-1].reshape(-1, logits.shape[-1]))
    loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(ids[:, 1:].reshape(-1)))
    return float(loss.exp())


def _original(scene: Scene) -> Any:
    assert scene.base is not None
    return scene.base.model()


def _needs_both(scene: Scene) -> str | None:
    return needs_base(scene) or needs_cloud_head(scene)


# --- A user asks for full rows ---

COLUMNS = 2  # of the classifier that are looked at, for each feature: the others would tell the same
TOP = (256, 1_024)  # the device's own top-k, and the largest that the cloud grants by default


def classifier_space(rows: Real) -> Array:
    """An orthonormal basis [rank, columns] of what full logit rows [n, columns] span; rank is where values drop most.

    Carlini et al., arXiv 2403.06634, §4: logits are hidden states times the classifier, so n > hidden rows span its
    columns, and no more.
    """
    _, values, basis = np.linalg.svd(rows.astype(np.float64), full_matrices=False)
    drop = values[:-1] / np.maximum(values[1:], 1e-12 * values[0])
    drop[values[1:] > 1e-4 * values[0]] = 0  # what is left after the rank is rounding
    kept: Array = basis[: int(drop.argmax()) + 1]
    return kept


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
    assert key.vocab is not None
    ids = windows(scene.text.secret, 6, hidden // 4)  # 1.5 × hidden positions
    inputs = scene.sent(ids.reshape(-1)).reshape(*ids.shape, hidden)
    rows = key.reveal_rows(forward(scene.target.weights.model(), inputs)).reshape(ids.size, -1)
    vocab = rows.shape[1]
    columns = np.random.default_rng(0).choice(vocab, min(COLUMNS * hidden, vocab), replace=False)
    found = classifier_space(rows[:, columns])
    classifier = scene.target.weights.read(scene.family.classifier).numpy()[np.argsort(key.vocab)[columns]]
    truth, _ = np.linalg.qr(classifier.astype(np.float64))  # [columns, hidden]
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


FULL_LOGITS = Attack(
    name="user-full-logits",
    title="The classifier from full logit rows",
    knows="a device bundle: key and table; asks for full rows (top_k 0), 1.5 for each feature",
    after="the classifier's column space: it is known up to an invertible matrix, and the hidden size is",
    source="Carlini et al., Stealing Part of a Production Language Model, arXiv 2403.06634, §4",
    run=read_classifier,
    applies=_needs_both,
)

# --- The stolen model, run as it is ---

ANSWER = 16  # tokens


def enter(scene: Scene, ids: Index) -> Array:
    """What a thief without the key feeds the stolen model: plain embeddings [..., hidden]."""
    return scene.table[ids]


@torch.inference_mode()
def _continued(model: Any, scene: Scene) -> str:
    """A greedy answer to the prompt, ids taken for plain."""
    ids, cache, answer = scene.text.prompt, None, []
    for _ in range(ANSWER):
        inputs = torch.from_numpy(np.ascontiguousarray(enter(scene, ids)))[None]
        result = model(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        ids = result.logits[0, -1:].argmax(-1).numpy()
        answer.append(ids)
    return scene.text.decode(np.concatenate([scene.text.prompt, *answer]))


def run_stolen(scene: Scene) -> Outcome:
    """The stolen model on plain text, beside the original."""
    ids = windows(scene.text.secret, WINDOWS, WINDOW)
    figures: dict[str, Any] = {}
    predicted = []
    for name in ("original", "stolen"):
        model = _original(scene) if name == "original" else scene.target.weights.model()
        logits = forward(model, scene.table[ids] if name == "original" else enter(scene, ids))
        figures |= {f"perplexity_{name}": round(perplexity(logits, ids), 2), f"text_{name}": _continued(model, scene)}
        predicted.append(logits.argmax(-1))
        del model, logits
    return Outcome(float((predicted[0] == predicted[1]).mean()), figures)


def _plain(scene: Scene) -> Target:
    """A victim that serves the public weights as they are."""
    base = scene.base
    assert base is not None
    key = UserKey("plain", np.arange(scene.table.shape[1]), np.arange(scene.table.shape[0]))
    return Target("none", "cloud", base, torch.float32, key, scene.table)


UNAUTHORIZED = Attack(
    name="unauthorized-use",
    title="The stolen model on plain embeddings (two lines on: a better thief)",
    knows="the tokenizer and the public table; tries nothing clever, as in the paper",
    after="next tokens that the original would choose",
    source="STIP (NDSS 2026), table 4",
    run=run_stolen,
    # Feeding plain embeddings is all there is to it, so the control serves plain weights.
    control=lambda scene: run_stolen(scene.with_target(_plain(scene))),
    applies=_needs_both,
)

# --- The stolen model, fed with its own classifier ---


def own_table(scene: Scene) -> Array:
    """Input vectors [vocab, hidden] for a stolen tied model: its classifier's rows, the gain undone by some traffic."""
    rows = scene.target.weights.read(scene.family.classifier).numpy()
    return undo_gain(_traffic(scene)[: 3 * rows.shape[1]], rows)


def _traffic(scene: Scene) -> Array:
    return distinct_vectors(scene.sent(scene.text.secret))


def run_on_own_table(scene: Scene) -> Outcome:
    """The stolen model in its own, renamed vocabulary: nothing but names should be missing."""
    assert scene.target.key.vocab is not None
    ids = windows(scene.text.secret, WINDOWS, WINDOW)
    logits = forward(_original(scene), scene.table[ids])  # the original is gone before the stolen one comes
    expected, original = logits.argmax(-1), perplexity(logits, ids)
    del logits
    renamed = np.argsort(scene.target.key.vocab)  # the row of each token
    model = scene.target.weights.model()
    table, rows = own_table(scene), scene.target.weights.read(scene.family.classifier).numpy()
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
    applies=needs_tied,
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
    logits = forward(_original(scene), scene.table[exam])
    expected = tokens[logits[..., tokens].argmax(-1)]
    seen = _last_states(scene, exam).reshape(-1, vectors.shape[1]) @ maps[chosen]
    named = tokens[classify_by_traffic(seen, vectors).argmax(1)].reshape(exam.shape)
    figures = {"map": chosen, "next_vector_guessed": fits[chosen], "distinct_tokens_seen": len(tokens)}
    return Outcome(float((named == expected).mean()), figures)


def _gain_is_missing(scene: Scene) -> bool:
    """Whether the cloud's last norm has ones where its gain should be: who folded it put it into the classifier."""
    axes = scene.family.axes(scene.family.classifier)
    assert not isinstance(axes, Dropped)
    gains = [axis.gain for axis in axes if isinstance(axis, After)]
    return all(bool((scene.target.weights.read(name) == 1).all()) for name in gains)


@torch.inference_mode()
def _last_states(scene: Scene, ids: Index) -> Real:
    """What the cloud returns for token ids [sequences, positions]: [sequences, positions, hidden]."""
    body = scene.target.weights.model().get_decoder()
    inputs = scene.sent(ids.reshape(-1)).reshape(*ids.shape, -1)
    rows = [body(inputs_embeds=torch.from_numpy(one[None]), use_cache=False).last_hidden_state[0] for one in inputs]
    states: Real = torch.stack(rows).numpy()
    return states


def _ridge(inputs: Real, outputs: Array) -> Real:
    """The linear map of least squares, with a tenth of the inputs' mean square against overfitting."""
    squares = inputs.T @ inputs
    squares += 0.1 * np.trace(squares) / len(squares) * np.eye(len(squares), dtype=np.float32)
    solved: Real = np.linalg.solve(squares, inputs.T @ outputs)
    return solved


NO_CLASSIFIER = Attack(
    name="classifier-from-traffic",
    title="Answers without a classifier, scored by traffic",
    knows="that the model is tied; hidden states and the vectors that travel",
    after="next tokens that the original would choose among those seen: which vectors they are, not their names",
    source="ours; follows from tying (Press and Wolf, arXiv 1608.05859)",
    run=run_without_classifier,
    control=lambda scene: run_without_classifier(scene.with_target(unprotected(scene, folds=False))),
    applies=lambda scene: (
        needs_base(scene) or (None if scene.target.head == "device" else "the cloud has the classifier itself")
    ),
)

# --- The stolen model, trained ---

STEPS = (0, 2, 5)  # after which perplexity is measured
TOKENS = 128  # a step
HELD_OUT = 2  # windows of TOKENS
NAMED = "stolen, own classifier as its table, names from traffic"
# The thief's first two were the best of 1e-3, 3e-3 and 1e-2.
RATES = {"original": 1e-3, "scratch": 1e-2, "stolen": 1e-2, "stolen body, learned tables": 1e-2, NAMED: 1e-3}


def thief_tables(scene: Scene, *, keyed: bool) -> tuple[Array, Array]:
    """What a thief puts before and behind the stolen body: input table and classifier [vocab, hidden], plain ids.

    Without the key: the public table, and the stolen classifier's rows taken for plain ids. `keyed` is for the control.
    """
    rows, key = scene.target.weights.read(scene.family.classifier).numpy(), scene.target.key
    if not keyed:
        return scene.table, rows
    assert key.vocab is not None
    return scene.target.vectors(scene.table), rows[np.argsort(key.vocab)]


def _assembled(scene: Scene, weights: Weights, table: Array, rows: Array) -> Any:
    """A trainable model with a body, an input table and a classifier of its own."""
    own = {scene.family.embedding: table, scene.family.classifier: rows}

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(own[name], np.float32)) if name in own else weights.read(name)

    shapes = {name: shape for name, shape in weights.shapes.items() if name not in own}
    return Weights(scene.target.weights.config, shapes | {name: own[name].shape for name in own}, read).model()


def train(model: Any, text: Text, rate: float, only: tuple[str, ...] = ()) -> list[float]:
    """Perplexity of held-out secret text after STEPS of training on public text. `only`: what learns; () for all.

    Adafactor (arXiv 1804.04235), whose state is a row and a column for each matrix: Adam's would double the memory.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not only or name in only)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: Any = torch.optim.Adafactor(learned, lr=rate, weight_decay=0.0)
    lessons = torch.from_numpy(windows(text.public, STEPS[-1], TOKENS))
    exam = windows(text.secret, HELD_OUT, TOKENS)
    results = []
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            results.append(perplexity(_examined(model, exam), exam))
        if step < STEPS[-1]:
            lesson = lessons[step : step + 1]
            optimizer.zero_grad()
            scores = model(input_ids=lesson, use_cache=False).logits[0, :-1]
            loss: Any = torch.nn.functional.cross_entropy(scores, lesson[0, 1:])
            loss.backward()
            optimizer.step()
    return [round(result, 2) for result in results]


@torch.inference_mode()
def _examined(model: Any, ids: Index) -> Real:
    logits: Real = model(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()
    return logits


@lru_cache(maxsize=1)  # the attack and its control measure by the same, on the same scene
def yardsticks(scene: Scene) -> tuple[list[float], list[float]]:
    """Perplexities of training the original, and a model of its sizes from scratch."""
    assert scene.base is not None
    rows = scene.base.read(scene.family.classifier).numpy()
    original = train(_assembled(scene, scene.base, scene.table, rows), scene.text, RATES["original"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = AutoModelForCausalLM.from_config(scene.target.weights.config).float().eval()
    return original, train(fresh, scene.text, RATES["scratch"])


def fine_tune(scene: Scene) -> Outcome:
    """What training the stolen model is worth, between training the original and starting from nothing."""
    original, scratch = yardsticks(scene)
    tables = thief_tables(scene, keyed=False)
    learned = (scene.family.embedding, scene.family.classifier)
    weights = scene.target.weights

    def trained(name: str, tables: tuple[Array, Array], only: tuple[str, ...] = ()) -> list[float]:
        return train(_assembled(scene, weights, *tables), scene.text, RATES[name], only)

    thieves = {
        "stolen": trained("stolen", tables),
        "stolen body, learned tables": trained("stolen body, learned tables", tables, learned),
    }
    if needs_tied(scene) is None:
        thieves[NAMED] = trained(NAMED, named_tables(scene))
    figures = {
        "steps": list(STEPS),
        "tokens_a_step": TOKENS,
        "perplexity": {"original": original, "scratch": scratch} | thieves,
    }
    return Outcome(worth(min(curve[-1] for curve in thieves.values()), original[-1], scratch[-1]), figures)


def named_tables(scene: Scene) -> tuple[Array, Array]:
    """Input table and classifier [vocab, hidden] of a tied stolen model, in the names that its traffic gave away."""
    table = own_table(scene)
    names = name_rows(scene, table)
    row = np.full(len(table), -1)  # of each token
    row[names[names >= 0]] = np.flatnonzero(names >= 0)
    row[row < 0] = np.setdiff1d(np.arange(len(table)), row)  # the others' names are anyone's guess
    rows: Array = scene.target.weights.read(scene.family.classifier).numpy()
    return table[row], rows[row]


def worth(stolen: float, original: float, scratch: float) -> float:
    """How far from scratch (0) to the original (1) a perplexity is, in logarithms."""
    return float(np.clip((np.log(scratch) - np.log(stolen)) / (np.log(scratch) - np.log(original)), 0.0, 1.0))


def fine_tune_in_order(scene: Scene) -> Outcome:
    """The control: a model whose features are in the open and whose names the traffic gives away, or the key."""
    original, scratch = yardsticks(scene)
    bare = scene.with_target(unprotected(scene))
    if needs_tied(scene) is None:  # the cipher's statistics are those of the text itself, so that every name is found
        tables = named_tables(replace(bare, text=replace(scene.text, public=scene.text.secret)))
    else:
        tables = thief_tables(bare, keyed=True)
    stolen = train(_assembled(bare, bare.target.weights, *tables), scene.text, RATES["original"])
    # Tokens of the lessons that were never sent have no name, so training may also lose a little: the best step counts.
    return Outcome(max(map(worth, stolen, original, scratch)), {"perplexity": stolen})


FINE_TUNING = Attack(
    name="theft-fine-tuning",
    title="The stolen model, fine-tuned",
    knows="the tokenizer, the public table and a little public text; for a tied model its traffic; matches no weights",
    after="the way from a fresh model's log-perplexity to the original's after the same short training",
    source="STIP (NDSS 2026), table 5, at a small scale",
    run=fine_tune,
    control=fine_tune_in_order,
    applies=_needs_both,
)

ATTACKS = (FULL_LOGITS, UNAUTHORIZED, OWN_TABLE, NO_CLASSIFIER, FINE_TUNING)
