"""Llama: grouped-query attention, rotary positions, gated MLP; dropout in attention only."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def build(layers=12, width=256, heads=8, length=256, batch=2, vocabulary=4096, dropout=0.1, seed=0):
    """Return `(model, args, kwargs)` of one training step; the caller's RNG stays as it is."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        max_position_embeddings=length,
        vocab_size=vocabulary,
        attention_dropout=dropout,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).train()
        tokens = torch.randint(vocabulary, (batch, length))
    return model, (), {"input_ids": tokens, "labels": tokens}
