"""Tables: pytorch-tabnet, tab-transformer-pytorch, tabm."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.field.case import Batch, Registry, Setup, batches, call, on_output

CASES = Registry(__name__)


@CASES("pytorch-tabnet")
def tabnet() -> Setup:
    """Sparsemax masks, ghost batch normalization, and the sparsity loss among the outputs."""
    from pytorch_tabnet.tab_network import TabNet

    size = {"n_d": 4, "n_a": 4, "n_steps": 2, "virtual_batch_size": 8}
    model = TabNet(10, 3, **size, cat_idxs=[0], cat_dims=[5], cat_emb_dim=[2], group_attention_matrix=torch.eye(10))

    def loss(module: nn.Module, out: Any, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(out[0], target) - 1e-3 * out[1]

    def make() -> Batch:
        table = torch.cat([torch.randint(5, (16, 1)).float(), torch.randn(16, 9)], 1)
        return call(table, target=torch.randint(3, (16,)))

    return Setup(model, batches(make), loss)


def _mixed() -> tuple[Batch, ...]:
    def make() -> Batch:
        return call(torch.randint(4, (8, 3)), torch.randn(8, 5), target=torch.rand(8, 1).round())

    return batches(make)


@CASES("tab-transformer-pytorch")
def tab_transformer() -> Setup:
    from tab_transformer_pytorch import TabTransformer

    size = {"categories": (4, 4, 4), "num_continuous": 5, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "dim_out": 1}
    return Setup(TabTransformer(**size, mlp_act=nn.ReLU(), attn_dropout=0.1, ff_dropout=0.1), _mixed(), _binary())


@CASES("tab-transformer-pytorch")
def feature_tokenizer() -> Setup:
    from tab_transformer_pytorch import FTTransformer

    size = {"categories": (4, 4, 4), "num_continuous": 5, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "dim_out": 1}
    return Setup(FTTransformer(**size, attn_dropout=0.1, ff_dropout=0.1), _mixed(), _binary())


def _binary() -> Any:
    return on_output(F.binary_cross_entropy_with_logits)


@CASES("tabm")
def ensemble() -> Setup:
    """Several members in one batch; each is trained on its own."""
    from tabm import TabM

    size = {"n_num_features": 5, "cat_cardinalities": [4, 4, 4], "d_out": 1, "n_blocks": 2, "d_block": 16, "k": 4}
    model = TabM.make(**size, dropout=0.1)

    def make() -> Batch:
        return call(torch.randn(8, 5), torch.randint(4, (8, 3)), target=torch.randn(8))

    def loss(module: nn.Module, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(out.squeeze(-1).flatten(0, 1), target.repeat_interleave(out.shape[1]))

    return Setup(model, batches(make), loss)
