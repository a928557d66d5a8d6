"""GPT-2: a decoder with a large logits tensor at the end and, with dropout, attention maps in every block."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel


def build(layers=12, width=256, heads=4, length=512, batch=2, vocabulary=4096, dropout=0.1, seed=0):
    """Return `(model, args, kwargs)` of one training step; the caller's RNG stays as it is.

    The vocabulary is smaller than GPT-2's 50257: at this width its logits would outweigh all twelve blocks.
    """
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        n_positions=length,
        vocab_size=vocabulary,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config).train()
        model.loss_type = "ForCausalLM"  # the default, said aloud: otherwise transformers logs that it guesses
        tokens = torch.randint(vocabulary, (batch, length))
    return model, (), {"input_ids": tokens, "labels": tokens}
