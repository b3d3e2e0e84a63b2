"""Tiny models of every type that llama.cpp runs too, of whole blocks of 32, and what llama.cpp makes of embeddings."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from tests.checkpoints import SIZES

# Two heads of 16 features share a block of 32, and so do two query heads of a group.
BLOCKS = SIZES | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
LLAMA3 = {
    "rope_theta": 10000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
MODELS: dict[str, Any] = {
    "llama": LlamaConfig(**BLOCKS, tie_word_embeddings=True),
    "llama-biases": LlamaConfig(**BLOCKS, attention_bias=True, mlp_bias=True),
    "llama-wide-heads": LlamaConfig(**BLOCKS, head_dim=32),
    "llama-3": LlamaConfig(**BLOCKS, rope_parameters=LLAMA3),
    "llama-linear": LlamaConfig(
        **BLOCKS, rope_parameters={"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}
    ),
    "mistral": MistralConfig(**BLOCKS, sliding_window=None),
    "mixtral": MixtralConfig(**BLOCKS, num_local_experts=4),
    "smollm3": SmolLM3Config(**BLOCKS | {"num_hidden_layers": 4}, no_rope_layers=[1, 1, 1, 0]),
    "qwen2": Qwen2Config(**BLOCKS),
    "qwen2-yarn": Qwen2Config(**BLOCKS, rope_parameters=YARN),
    "qwen3": Qwen3Config(**BLOCKS, head_dim=32, tie_word_embeddings=True),
    "qwen2-moe": Qwen2MoeConfig(**BLOCKS, **EXPERTS, shared_expert_intermediate_size=64),
    "qwen3-moe": Qwen3MoeConfig(**BLOCKS, **EXPERTS, head_dim=16, norm_topk_prob=True),
    "phi": PhiConfig(**BLOCKS, rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
    "phi3": Phi3Config(**BLOCKS),
    "gpt2": GPT2Config(vocab_size=320, n_embd=64, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
}


def llama_cpp_logits(path: Path, embeddings: np.ndarray) -> np.ndarray:
    """Logits [positions, vocab] that llama.cpp computes from embeddings [positions, hidden], with keys and values in
    float32."""
    import llama_cpp

    positions, hidden = embeddings.shape
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
    assert model, f"llama.cpp does not load {path}"
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = 64
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = 0  # float32
    options.flash_attn_type = 0  # flash attention rounds queries to float16
    context = llama_cpp.llama_init_from_model(model, options)
    batch = llama_cpp.llama_batch_init(positions, hidden, 1)
    try:
        sent = np.ascontiguousarray(embeddings, np.float32)
        ctypes.memmove(batch.embd, sent.ctypes.data, sent.nbytes)
        batch.n_tokens = positions
        for at in range(positions):
            batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = at, 1, 0, 1
        assert llama_cpp.llama_decode(context, batch) == 0
        width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        rows = (llama_cpp.llama_get_logits_ith(context, at) for at in range(positions))
        return np.stack([np.ctypeslib.as_array(row, (width,)).copy() for row in rows])
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
