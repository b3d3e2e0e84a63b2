"""Encoders of text, all post-LayerNorm: BERT, RoBERTa, DistilBERT.

Devices send the sum of word, position and type embeddings before the first LayerNorm, which stays in the cloud.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PretrainedConfig

from export.families.family import Family, Read, TextInput
from export.families.parts import attention, layer_norm, linear, projections
from export.spaces import Dropped, Features, OnDevice, Row, Stream, Structure

_HEAD = Dropped("a head that is not served")
_BUFFER = Dropped("a buffer that the stock model computes")


def _structures(config: Any, inner: int) -> Iterable[Structure]:
    yield Stream("residual", config.hidden_size, "post")
    yield Features("classes", config.num_labels)
    yield Features("classifier", config.hidden_size)
    for layer in range(config.num_hidden_layers):
        yield attention(config, layer, rotary=0.0)
        yield Features(f"ffn[{layer}]", inner)


def _bert_rows(head: dict[str, Row]) -> dict[str, Row]:
    layer = "encoder.layer.{i}."
    return {
        "embeddings.word_embeddings.weight": OnDevice(),
        "embeddings.position_embeddings.weight": OnDevice(zeros=True),
        "embeddings.token_type_embeddings.weight": OnDevice(zeros=True),
        "embeddings.position_ids": _BUFFER,
        **layer_norm("embeddings.LayerNorm"),
        **projections(
            *(f"{layer}attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")),
            into="residual",
            stream="residual",
        ),
        **layer_norm(layer + "attention.output.LayerNorm"),
        **linear(layer + "intermediate.dense", into="residual", out="ffn[{i}]"),
        **linear(layer + "output.dense", into="ffn[{i}]", out="residual"),
        **layer_norm(layer + "output.LayerNorm"),
        # Pooled vectors are revealed like hidden states.
        **linear("pooler.dense", into="residual", out="residual"),
        **head,
    }


def _text(prefix: str, first: int | None = None) -> TextInput:
    """Word + position + type 0. first: the position of the first token, where that is not 0."""

    def positions(config: Any, read: Read) -> torch.Tensor:
        start = config.pad_token_id + 1 if first is None else first
        return read(prefix + "position_embeddings.weight")[start:] + read(prefix + "token_type_embeddings.weight")[0]

    return TextInput(prefix + "word_embeddings.weight", positions=positions)


def _unsupported(config: Any) -> str | None:
    return "is_decoder: seen true, wanted an encoder" if getattr(config, "is_decoder", False) else None


BERT = Family(
    name="bert",
    model_types=("bert",),
    kind="encoder",
    classes={
        "BertModel": "BertModel",
        "BertForSequenceClassification": "BertForSequenceClassification",
        "BertForMaskedLM": "BertModel",
        "BertForPreTraining": "BertModel",
    },
    tensors=_bert_rows({"cls.{*}": _HEAD, **linear("classifier", into="residual", out="classes")}),
    structures=lambda config: _structures(config, config.intermediate_size),
    text=_text("embeddings.", 0),
    prefix="bert.",
    optional=("pooler.",),
    tried="MiniLM-L6, random weights",
    unsupported=_unsupported,
)
ROBERTA = Family(
    name="roberta",
    model_types=("roberta", "xlm-roberta"),
    kind="encoder",
    classes={
        "RobertaModel": "RobertaModel",
        "RobertaForSequenceClassification": "RobertaForSequenceClassification",
        "RobertaForMaskedLM": "RobertaModel",
        "XLMRobertaModel": "XLMRobertaModel",
        "XLMRobertaForSequenceClassification": "XLMRobertaForSequenceClassification",
        "XLMRobertaForMaskedLM": "XLMRobertaModel",
    },
    tensors=_bert_rows(
        {
            "lm_head.{*}": _HEAD,
            **linear("classifier.dense", into="residual", out="classifier"),
            **linear("classifier.out_proj", into="classifier", out="classes"),
        }
    ),
    structures=BERT.structures,
    text=_text("embeddings."),  # positions count from behind the padding's
    settings={"pad_token_id": 0},  # which they count from in the cloud too, over a table of zeros
    prefix="roberta.",
    optional=("pooler.",),
    unsupported=_unsupported,
)

_LAYER = "transformer.layer.{i}."


def _distilbert_structures(config: PretrainedConfig) -> Iterable[Structure]:
    return _structures(config, config.hidden_dim)


DISTILBERT = Family(
    name="distilbert",
    model_types=("distilbert",),
    kind="encoder",
    classes={
        "DistilBertModel": "DistilBertModel",
        "DistilBertForSequenceClassification": "DistilBertForSequenceClassification",
        "DistilBertForMaskedLM": "DistilBertModel",
    },
    tensors={
        "embeddings.word_embeddings.weight": OnDevice(),
        "embeddings.position_embeddings.weight": OnDevice(zeros=True),
        **layer_norm("embeddings.LayerNorm"),
        **projections(
            *(f"{_LAYER}attention.{name}_lin" for name in ("q", "k", "v", "out")), into="residual", stream="residual"
        ),
        **layer_norm(_LAYER + "sa_layer_norm"),
        **linear(_LAYER + "ffn.lin1", into="residual", out="ffn[{i}]"),
        **linear(_LAYER + "ffn.lin2", into="ffn[{i}]", out="residual"),
        **layer_norm(_LAYER + "output_layer_norm"),
        "vocab_transform.{*}": _HEAD,
        "vocab_layer_norm.{*}": _HEAD,
        "vocab_projector.{*}": _HEAD,
        **linear("pre_classifier", into="residual", out="classifier"),
        **linear("classifier", into="classifier", out="classes"),
    },
    structures=_distilbert_structures,
    text=TextInput(
        "embeddings.word_embeddings.weight",
        positions=lambda config, read: read("embeddings.position_embeddings.weight"),
    ),
    prefix="distilbert.",
)
