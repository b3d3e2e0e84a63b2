"""What a stock model gives: from text and pixels, as everyone runs it, and from what a device sends instead.

Results are rows [n, width] that are compared one by one: logits, or hidden states where a model has no classifier.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from export.families import Family


@dataclass(frozen=True)
class Inputs:
    """ids [sequences, positions]; target [sequences, positions] of a decoder that reads an encoder;
    pixels [images, 3, height, width], scaled as the stock model wants them. In `ids`, placeholders stand for images."""

    ids: torch.Tensor | None = None
    target: torch.Tensor | None = None
    pixels: torch.Tensor | None = None


@dataclass(frozen=True)
class Sent:
    """What a device sends for the same: embeddings [sequences, positions, hidden] that are hidden or not, and rows
    [sequences, positions, width] for an encoder beside a decoder. `image_at`: where an image stands in the text."""

    embeddings: torch.Tensor
    encoder: torch.Tensor | None = None
    image_at: int | None = None
    image_tokens: int = 0


class Given(torch.nn.Module):
    """Stands in for a module that embeds pixels, where they were embedded already."""

    def __init__(self) -> None:
        super().__init__()
        # The stock ViT casts pixels to the dtype of its convolution.
        self.patch_embeddings = torch.nn.Module()
        self.patch_embeddings.projection = torch.nn.Linear(1, 1)

    def forward(self, embeddings: torch.Tensor, **_: object) -> torch.Tensor:
        return embeddings


def plain(inputs: Inputs, *, pooled: bool) -> Callable[[Any], torch.Tensor]:
    """The stock forward on plain inputs. pooled: whether the checkpoint has a pooler, where the class has one."""
    named = {"input_ids": inputs.ids, "decoder_input_ids": inputs.target, "pixel_values": inputs.pixels}
    given = {name: value for name, value in named.items() if value is not None}
    return lambda model: _rows(_with_pooler(model, pooled)(**given))


def from_sent(family: Family, sent: Sent, *, pooled: bool) -> Callable[[Any], torch.Tensor]:
    """The stock forward on what a device sends."""
    return lambda model: _rows(_run(_with_pooler(model, pooled), family, sent))


def hidden_from_sent(sent: Sent) -> Callable[[Any], torch.Tensor]:
    """What the classifier of a decoder of text would be given, from what a device sends."""
    return lambda model: _flat(model.get_decoder()(inputs_embeds=sent.embeddings).last_hidden_state)


def _with_pooler(model: Any, pooled: bool) -> Any:
    if not pooled and hasattr(model, "pooler"):
        model.pooler = None
    return model


def _run(model: Any, family: Family, sent: Sent) -> Any:
    if family.image is not None:
        model.get_submodule(family.image.tower).embeddings = Given()
    if family.kind == "image-encoder":
        return model(pixel_values=sent.embeddings)
    if family.kind == "encoder-decoder":
        return model(inputs_embeds=sent.encoder, decoder_inputs_embeds=sent.embeddings)
    embeddings = sent.embeddings
    if sent.encoder is not None and sent.image_at is not None:
        features = torch.stack(list(model.get_image_features(sent.encoder).pooler_output))
        before, behind = embeddings[:, : sent.image_at], embeddings[:, sent.image_at + sent.image_tokens :]
        embeddings = torch.cat([before, features, behind], dim=1)
    return model(inputs_embeds=embeddings)


def _rows(output: Any) -> torch.Tensor:
    if getattr(output, "logits", None) is not None:
        return _flat(output.logits)
    pooled = getattr(output, "pooler_output", None)
    hidden = _flat(output.last_hidden_state)
    return hidden if pooled is None else torch.cat([hidden, pooled])


def _flat(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, values.shape[-1])
