"""BERT: a bidirectional encoder that predicts masked tokens; dropout in attention and after every projection."""

import torch
from transformers import BertConfig, BertForMaskedLM


def build(layers=12, width=256, heads=4, length=256, batch=4, vocabulary=4096, dropout=0.1, seed=0):
    """Return `(model, args, kwargs)` of one training step; the caller's RNG stays as it is."""
    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=length,
        vocab_size=vocabulary,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForMaskedLM(config).train()
        tokens = torch.randint(vocabulary, (batch, length))
        labels = torch.where(torch.rand(batch, length) < 0.15, tokens, -100)  # the share that BERT masks; -100 counts nothing
    return model, (), {"input_ids": tokens, "labels": labels}
