"""An attack: what the attacker is assumed to know, what it gets, and the control that shows the attack works."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from export.audit.scene import Scene, unprotected


@dataclass(frozen=True)
class Outcome:
    """What one run of an attack got."""

    share: float  # recovered, of what the attack is after: 0 to 1
    figures: dict[str, Any] = field(default_factory=dict)  # anything more, for the JSON, tables and plots


@dataclass(frozen=True)
class Attack:
    """One way to get at what is hidden.

    run: the attack, on the victim of a scene.
    control: the same on a victim that is not protected, which must get 99 % or more; by default on `unprotected`.
    applies: why it does not apply to a scene, or None.
    """

    name: str  # stable: SECURITY.md and JSON name it
    title: str
    knows: str  # beyond the cloud's own files and traffic
    after: str  # what `share` is a share of
    source: str  # where the idea is from
    run: Callable[[Scene], Outcome]
    control: Callable[[Scene], Outcome] | None = None
    applies: Callable[[Scene], str | None] = lambda scene: None


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the report."""

    name: str
    title: str
    knows: str
    after: str
    source: str
    recovered: float | None  # None where it does not apply
    control: float | None
    seconds: float  # of the attack alone
    skipped: str | None = None
    figures: dict[str, Any] = {}


def carry_out(attack: Attack, scene: Scene) -> Finding:
    """Runs an attack and its control."""
    described = {key: getattr(attack, key) for key in ("name", "title", "knows", "after", "source")}
    if reason := attack.applies(scene):
        return Finding(**described, recovered=None, control=None, seconds=0.0, skipped=reason)
    started = time.monotonic()
    outcome = attack.run(scene)
    seconds = time.monotonic() - started
    control = attack.control(scene) if attack.control else attack.run(scene.with_target(unprotected(scene)))
    return Finding(
        **described,
        recovered=outcome.share,
        control=control.share,
        seconds=round(seconds, 2),
        figures=outcome.figures,
    )


# --- why an attack does not apply: about the model first, then about who attacks ---

Condition = Callable[[Scene], str | None]


def needs(*conditions: Condition) -> Condition:
    """The first reason of several."""
    return lambda scene: next((reason for condition in conditions if (reason := condition(scene))), None)


def needs_text(scene: Scene) -> str | None:
    """For attacks on tokens."""
    return None if scene.family.text is not None else "the model takes no text"


def needs_image(scene: Scene) -> str | None:
    """For attacks on images."""
    return None if scene.images is not None else "the model takes no images"


def needs_next_tokens(scene: Scene) -> str | None:
    """For attacks on a decoder that continues its prompt."""
    if scene.family.kind in ("decoder", "vision-decoder"):
        return None
    return f"for decoders, which continue what they are sent; this is a model of kind {scene.family.kind}"


def needs_no_positions(scene: Scene) -> str | None:
    """For attacks to which a token is the same vector wherever it stands."""
    if scene.tokens.positions is None:
        return None
    return "devices add positions to what travels, which this attack does not undo"


def needs_base(scene: Scene) -> str | None:
    """For attacks by who has the public weights."""
    return None if scene.base is not None else "no public model was given: --model"


def needs_cloud_head(scene: Scene) -> str | None:
    """For attacks on the classifier or the logits that the cloud sees."""
    return None if scene.target.head == "cloud" else "the classifier is on the device: the cloud has none to attack"
