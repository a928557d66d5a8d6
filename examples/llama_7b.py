"""Llama with 7 billion parameters, planned for a GPU that is not here: model and tokens lie on the meta device, without data.

    planner plan examples/llama_7b.py:build --device H100-80GB --budget 79GiB --optimizer adamw

Weights, gradients and both states of AdamW in bfloat16 take 50 GiB. (With float32 weights and states besides,
`--master-weights`, they take 100 GiB, which no schedule fits into 80.) It cannot be trained here, nor compared.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def build(layers=32, width=4096, intermediate=11008, heads=32, length=4096, batch=4, vocabulary=32000):
    """Return `(model, args, kwargs)` of one training step; the defaults are Llama-2 7B's."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        max_position_embeddings=length,
        vocab_size=vocabulary,
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).train()
        tokens = torch.empty((batch, length), dtype=torch.int64)
    return model, (), {"input_ids": tokens, "labels": tokens}
