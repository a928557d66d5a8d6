"""Efficient attention: performer, linear attention, reformer, routing transformer, product keys, conformer."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.field.case import Registry, Setup, batches, call, on_output
from benchmarks.field.models.language import VOCABULARY, next_token, next_tokens, tokens

CASES = Registry(__name__)


@CASES("performer-pytorch")
def performer() -> Setup:
    """Random features, redrawn every so many calls: the module counts them."""
    from performer_pytorch import PerformerLM

    size = {"num_tokens": VOCABULARY, "max_seq_len": 32, "dim": 32, "depth": 2, "heads": 2, "dim_head": 16}
    model = PerformerLM(**size, causal=False, nb_features=8, feature_redraw_interval=2, ff_dropout=0.1)
    return Setup(model, next_tokens(32), next_token)


@CASES("performer-pytorch")
def performer_autoregressive() -> Setup:
    from performer_pytorch import PerformerLM
    from performer_pytorch.autoregressive_wrapper import AutoregressiveWrapper

    size = {"num_tokens": VOCABULARY, "max_seq_len": 32, "dim": 32, "depth": 2, "heads": 2, "dim_head": 16}
    model = PerformerLM(**size, causal=False, generalized_attention=True, nb_features=8)
    return Setup(AutoregressiveWrapper(model), tokens(33))


@CASES("linear-attention-transformer")
def linear_attention() -> Setup:
    from linear_attention_transformer import LinearAttentionTransformerLM

    size = {"num_tokens": VOCABULARY, "dim": 32, "heads": 2, "depth": 2, "max_seq_len": 32, "n_local_attn_heads": 1}
    model = LinearAttentionTransformerLM(**size, local_attn_window_size=8, causal=True, attn_dropout=0.1)
    return Setup(model, next_tokens(32), next_token)


@CASES("reformer-pytorch")
def reformer_reversible() -> Setup:
    """Locality-sensitive hashing, and reversible blocks that store the generator's state on themselves."""
    from reformer_pytorch import ReformerLM

    size = {"num_tokens": VOCABULARY, "dim": 32, "depth": 2, "max_seq_len": 32, "heads": 2, "bucket_size": 8}
    return Setup(ReformerLM(**size, n_hashes=2, causal=True, ff_dropout=0.1), next_tokens(32), next_token)


@CASES("routing-transformer")
def routing() -> Setup:
    """K-means in the attention, initialized from the first batch and moved by every one; returns an auxiliary loss."""
    from routing_transformer import RoutingTransformerLM

    size = {"num_tokens": VOCABULARY, "dim": 32, "heads": 2, "depth": 2, "max_seq_len": 32, "window_size": 8}
    model = RoutingTransformerLM(**size, causal=True)

    def loss(module: nn.Module, out: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        return next_token(module, out[0], target) + out[1]

    return Setup(model, next_tokens(32), loss, copied=False)


@CASES("product-key-memory", precisions=("fp32",))  # embedding_bag takes no bfloat16 weights per sample
def product_keys() -> Setup:
    from product_key_memory import PKM

    memory = PKM(32, heads=2, dim_head=16, num_keys=8, topk=4, input_dropout=0.1)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 32), nn.LayerNorm(32), memory, nn.Linear(32, VOCABULARY))
    return Setup(model, next_tokens(16), next_token)


@CASES("conformer")
def conformer() -> Setup:
    from conformer import Conformer

    size = {"dim": 32, "depth": 2, "dim_head": 16, "heads": 2, "conv_expansion_factor": 2, "conv_kernel_size": 7}
    dropout = {"attn_dropout": 0.1, "ff_dropout": 0.1, "conv_dropout": 0.1}
    data = batches(lambda: call(torch.randn(2, 24, 32), target=torch.randn(2, 24, 32)))
    return Setup(Conformer(**size, **dropout), data, on_output(nn.functional.mse_loss))


@CASES("soft-moe-pytorch")
def soft_experts() -> Setup:
    from soft_moe_pytorch import SoftMoE

    experts = SoftMoE(dim=32, seq_len=16, num_experts=4)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 32), experts, nn.Linear(32, VOCABULARY))
    return Setup(model, next_tokens(16), next_token)
