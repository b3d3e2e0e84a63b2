"""From conversations to prompts, where models differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit, softmax

from device_app.bundle import Bundle
from device_app.encoder import _probabilities
from device_app.prompt import Prompter
from tests.checkpoints import LOOKING_TEMPLATE
from tests.device_app.bundles import START_ID, make_bundle

HELLO = [{"role": "user", "content": "the cat"}]


def prompt(folder: Path) -> list[int]:
    prompter = Prompter(Bundle.open(folder))
    return prompter.ids(prompter.turns(HELLO))


def test_a_processor_s_template_leaves_the_first_token_to_the_tokenizer(tmp_path: Path) -> None:
    # LLaVA's begins with the user's words; the stock processor puts the begin token before them.
    bare = LOOKING_TEMPLATE.replace("<|start|>", "")
    without = prompt(make_bundle(tmp_path / "bare", "vision-decoder", template=bare, prefix_ids=[]))
    with_it = prompt(make_bundle(tmp_path / "begun", "vision-decoder", template=bare, prefix_ids=[START_ID]))
    assert with_it == [START_ID, *without]


def test_a_template_that_has_the_first_token_is_not_given_another(tmp_path: Path) -> None:
    ids = prompt(make_bundle(tmp_path / "begun", "vision-decoder", prefix_ids=[START_ID]))
    assert ids[0] == START_ID and ids[1] != START_ID


def test_a_tokenizer_s_template_is_taken_as_it_is(tmp_path: Path) -> None:
    # As transformers does: apply_chat_template() adds no special tokens.
    plain = prompt(make_bundle(tmp_path / "plain", "decoder", template="{{ messages[0]['content'] }}", prefix_ids=[]))
    begun = make_bundle(tmp_path / "begun", "decoder", template="{{ messages[0]['content'] }}", prefix_ids=[START_ID])
    assert prompt(begun) == plain


@pytest.mark.parametrize(
    ("activation", "expected"), [("softmax", softmax), ("sigmoid", expit), ("none", lambda logits: logits)]
)
def test_class_logits_become_probabilities_or_stay_scores(activation: str, expected: object) -> None:
    logits = np.array([-800.0, -3.0, 0.0, 2.5, 700.0])
    assert np.allclose(_probabilities(logits, activation), expected(logits), atol=1e-12)  # type: ignore[operator]
