"""Language models and encoders: x-transformers, mambapy, local-attention, st-moe-pytorch, open-clip, sentence-transformers."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.field.case import Batch, Registry, Setup, batches, call

CASES = Registry(__name__)
VOCABULARY = 50


def tokens(length: int = 24, count: int = 2) -> tuple[Batch, ...]:
    """Token ids alone."""
    return batches(lambda: call(torch.randint(VOCABULARY, (count, length))))


def next_token(module: nn.Module, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the shifted logits, transposed as nn.CrossEntropyLoss wants them."""
    return F.cross_entropy(out[:, :-1].transpose(1, 2), target[:, 1:])


def next_tokens(length: int = 24, count: int = 2) -> tuple[Batch, ...]:
    """Token ids, which are the targets, too."""

    def make() -> Batch:
        ids = torch.randint(VOCABULARY, (count, length))
        return call(ids, target=ids)

    return batches(make)


def _decoder(**options: Any) -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=2, heads=2, attn_dim_head=16, **options)
    return TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=32, attn_layers=layers)


@CASES("x-transformers")
def autoregressive() -> Setup:
    from x_transformers import AutoregressiveWrapper

    return Setup(AutoregressiveWrapper(_decoder(attn_dropout=0.1, ff_dropout=0.1)), tokens())


@CASES("x-transformers")
def rotary_flash() -> Setup:
    return Setup(_decoder(rotary_pos_emb=True, attn_flash=True, ff_glu=True, use_rmsnorm=True), next_tokens(), next_token)


@CASES("x-transformers")
def layer_dropout() -> Setup:
    """Skips layers by Python's generator."""
    return Setup(_decoder(layer_dropout=0.3), next_tokens(), next_token)


@CASES("x-transformers")
def alibi_talking_heads() -> Setup:
    return Setup(_decoder(alibi_pos_bias=True, attn_pre_talking_heads=True, attn_qk_norm=True), next_tokens(), next_token)


@CASES("x-transformers")
def encoder_decoder() -> Setup:
    from x_transformers import XTransformer

    encoder = {"enc_num_tokens": VOCABULARY, "enc_depth": 1, "enc_heads": 2, "enc_max_seq_len": 24, "enc_attn_dim_head": 16}
    decoder = {"dec_num_tokens": VOCABULARY, "dec_depth": 1, "dec_heads": 2, "dec_max_seq_len": 24, "dec_attn_dim_head": 16}
    model = XTransformer(dim=32, tie_token_emb=True, **encoder, **decoder)

    def make() -> Batch:
        ids = torch.randint(VOCABULARY, (2, 24))
        return call(ids, torch.randint(VOCABULARY, (2, 24)), mask=torch.ones(2, 24, dtype=torch.bool))

    return Setup(model, batches(make))


@CASES("x-transformers")
def masked_language_model() -> Setup:
    """BERT's masking, drawn in the forward."""
    from x_transformers import Encoder, TransformerWrapper

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = Encoder(dim=32, depth=2, heads=2, attn_dim_head=16, attn_dropout=0.1)
            self.net = TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=32, attn_layers=layers)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            masked = torch.rand(ids.shape) < 0.15
            labels = ids.masked_fill(~masked, -100)
            return F.cross_entropy(self.net(ids.masked_fill(masked, 1)).transpose(1, 2), labels)

    return Setup(Masked(), tokens())


@CASES("mambapy")
def mamba() -> Setup:
    """The parallel scan is an autograd Function."""
    from mambapy.mamba import Mamba, MambaConfig

    body = Mamba(MambaConfig(d_model=24, n_layers=2, d_state=4, expand_factor=2))
    model = nn.Sequential(nn.Embedding(VOCABULARY, 24), body, nn.Linear(24, VOCABULARY))
    return Setup(model, next_tokens(16), next_token)


@CASES("local-attention")
def local_transformer() -> Setup:
    from local_attention import LocalTransformer

    size = {"num_tokens": VOCABULARY, "dim": 32, "depth": 2, "max_seq_len": 32, "heads": 2, "dim_head": 16}
    model = LocalTransformer(**size, causal=True, local_attn_window_size=8, attn_dropout=0.1)
    return Setup(model, batches(lambda: call(torch.randint(VOCABULARY, (2, 32)), return_loss=True)))


@CASES("st-moe-pytorch")
def sparse_experts() -> Setup:
    """A mixture of experts with its balance and router losses among the outputs."""
    from st_moe_pytorch import MoE, SparseMoEBlock

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY)
            self.block = SparseMoEBlock(MoE(dim=32, num_experts=4, gating_top_n=2), add_ff_before=True)

        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            out, auxiliary, *_ = self.block(self.embed(ids))
            return self.head(out), auxiliary

    def loss(module: nn.Module, out: Any, target: torch.Tensor) -> torch.Tensor:
        return next_token(module, out[0], target) + out[1]

    return Setup(Experts(), next_tokens(16), loss)


@CASES("open_clip_torch")
def clip_contrastive() -> Setup:
    """Image and text towers, and OpenCLIP's contrastive loss."""
    from open_clip import CLIP, ClipLoss
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=32, patch_dropout=0.25)
    text = CLIPTextCfg(context_length=12, vocab_size=VOCABULARY, width=32, heads=2, layers=2)
    contrast = ClipLoss()

    def loss(module: nn.Module, out: Any, target: Any) -> torch.Tensor:
        image, words, scale = out
        value: torch.Tensor = contrast(image, words, scale)
        return value

    def make() -> Batch:
        return call(torch.randn(4, 3, 32, 32), torch.randint(VOCABULARY, (4, 12)))

    return Setup(CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text), batches(make), loss)


@CASES("open_clip_torch")
def coca_captions() -> Setup:
    """Contrastive and captioning loss; the output is a dict."""
    from open_clip import CoCa, CoCaLoss
    from open_clip.coca_model import MultimodalCfg
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    pool = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4, "output_tokens": True}
    vision = CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=32, **pool)
    size = {"context_length": 12, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 1}
    text, mixed = CLIPTextCfg(**size, embed_cls=True, output_tokens=True), MultimodalCfg(**size)
    losses = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)

    def loss(module: nn.Module, out: Any, target: Any) -> torch.Tensor:
        given = {key: out[key] for key in ("image_features", "text_features", "logits", "labels", "logit_scale")}
        return sum(losses(**given), torch.zeros(()))

    def make() -> Batch:
        return call(torch.randn(2, 3, 32, 32), torch.randint(1, VOCABULARY, (2, 12)))

    model = CoCa(embed_dim=32, multimodal_cfg=mixed, vision_cfg=vision, text_cfg=text)
    for parameter in model.parameters():  # some are left uninitialized for a checkpoint to fill
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    nn.init.normal_(model.text.cls_emb, std=0.05)
    return Setup(model, batches(make), loss)


@functools.cache
def _bert_folder() -> str:
    """A tiny BERT with its tokenizer, as from_pretrained loads them; one for the process, so that its path never changes."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(VOCABULARY))]
    (Path(folder) / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(str(Path(folder) / "vocab.txt")).save_pretrained(folder)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), **size)).save_pretrained(folder)
    return folder


def _sentence_encoder() -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    return SentenceTransformer(modules=[Transformer(_bert_folder()), Pooling(32)], device="cpu")


@CASES("sentence-transformers")
def ranking_loss() -> Setup:
    """Planned is the encoder, which takes and returns a dict of features; the loss calls it once per text column."""
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    model = _sentence_encoder()

    def forward(module: nn.Module, batch: Batch) -> tuple[Any, torch.Tensor]:
        first, second = batch.args[0], batch.target
        pair = [module(dict(features))["sentence_embedding"] for features in (first, second)]
        losses = MultipleNegativesRankingLoss(model)
        value: torch.Tensor = losses.compute_loss_from_embeddings(pair, None)
        return pair, value

    def features() -> dict[str, torch.Tensor]:
        ids = torch.randint(5, VOCABULARY, (4, 8))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}

    return Setup(model, batches(lambda: call(features(), target=features())), forward=forward)


@CASES("sentence-transformers")
def cosine_similarity_loss() -> Setup:
    """Planned is the loss module, as the trainer calls it: (list of features, labels)."""
    from sentence_transformers.losses import CosineSimilarityLoss

    model = CosineSimilarityLoss(_sentence_encoder())

    def features() -> dict[str, torch.Tensor]:
        ids = torch.randint(5, VOCABULARY, (4, 8))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}

    return Setup(model, batches(lambda: call([features(), features()], torch.rand(4))))
