"""Small randomly initialised Hugging Face models, one per architecture, each with the arguments of one training call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from tests.support.models import Built

Settings = dict[str, Any]

VOCABULARY, BATCH, LENGTH, CLASSES = 99, 4, 16, 10
PAD, START, END = 0, 1, 2
DROPOUT = 0.1

# A config takes of these what it has, under this name or under an alias of it.
SIZES: Settings = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": START,
    "eos_token_id": END,
    "sep_token_id": END,
    "cls_token_id": START,
    "decoder_start_token_id": START,
    "use_cache": False,
    "image_size": 32,
    "patch_size": 4,
    "embedding_size": 16,
    "projection_dim": 16,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}

EXPERTS: Settings = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
SLIDING: Settings = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EAGER: Settings = {"attn_implementation": "eager"}

CAUSAL: dict[str, Settings] = {
    "gpt2": {},
    "gpt2-eager": EAGER,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 4},
    "llama": {},
    "llama-eager": EAGER,
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
    "phi": {},
    "phi3": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {},
    "falcon": {},
    "olmo": {},
    "olmo2": {},
    "stablelm": {},
    "cohere": {},
    "codegen": {"rotary_dim": 4},
    "mpt": {},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 8},
    "rwkv": {"attention_hidden_size": 32},
    "mixtral": {"num_local_experts": 4, "output_router_logits": True},
    "mixtral-eager": EAGER | {"num_local_experts": 4, "experts_implementation": "eager"},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3_moe": EXPERTS,
    "olmoe": EXPERTS,
}

MASKED: dict[str, Settings] = {
    "bert": {},
    "bert-eager": EAGER,
    "roberta": {},
    "xlm-roberta": {},
    "distilbert": {"hidden_dim": 64},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    "electra": {},
    "albert": {},
    "mpnet": {},
    "modernbert": {"local_attention": 8},
    "longformer": {"attention_window": 8},
    "big_bird": {"attention_type": "original_full"},
}

SEQ2SEQ: dict[str, Settings] = {
    "t5": {"d_kv": 8, "d_ff": 64, "num_decoder_layers": 2, "decoder_start_token_id": START},
    "mt5": {"d_kv": 8, "d_ff": 64, "num_decoder_layers": 2},
    "bart": {},
    "bart-eager": EAGER,
    "mbart": {},
    "pegasus": {},
    "m2m_100": {},
    "marian": {"decoder_vocab_size": VOCABULARY},
    "led": {"attention_window": 8, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
}

STAGES: Settings = {"hidden_sizes": [16, 32], "depths": [2, 2]}
WINDOWS: Settings = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}

IMAGE: dict[str, Settings] = {
    "vit": {},
    "vit-eager": EAGER,
    "deit": {"architectures": ["DeiTForImageClassification"]},
    "beit": {"use_relative_position_bias": True},
    "dinov2": {},
    "swin": WINDOWS,
    "swinv2": WINDOWS,
    "convnext": STAGES | {"num_stages": 2},
    "convnextv2": STAGES | {"num_stages": 2},
    "resnet": STAGES,
    "regnet": STAGES | {"groups_width": 8},
    "poolformer": STAGES | {"patch_sizes": [7, 3], "strides": [4, 2], "padding": [2, 1], "num_encoder_blocks": 2},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "efficientnet": {
        "width_coefficient": 0.1,
        "depth_coefficient": 1.0,
        "hidden_dim": 128,
        "kernel_sizes": [3, 3, 5],
        "in_channels": [32, 80, 160],
        "out_channels": [80, 160, 240],
        "strides": [1, 2, 2],
        "num_block_repeats": [1, 2, 1],
        "expand_ratios": [1, 4, 4],
    },
}

CONVOLUTIONS: Settings = {
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 3],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
}

SPEECH: dict[str, Settings] = {"wav2vec2": CONVOLUTIONS, "hubert": CONVOLUTIONS, "wavlm": CONVOLUTIONS}

# These also get a mask with some padding, which most of them look at on the host.
PADDED = {"gpt2", "llama", "llama-eager", "mistral", "gemma2", "bloom", "mixtral", "bert", "bert-eager", "roberta"}
PADDED |= {"deberta-v2", "mpnet", "modernbert", "bart", "bart-eager", "t5"}


def config(model_type: str, **settings: Any) -> PreTrainedConfig:
    """The config at SIZES and with dropout wherever there is a knob for it; other settings by name."""
    default = AutoConfig.for_model(model_type)
    named = {default.attribute_map.get(alias, alias): size for alias, size in SIZES.items()}
    shared = {name: size for name, size in named.items() if name in vars(default)}
    small = AutoConfig.for_model(model_type, **(shared | settings))
    add_dropout(small)
    return small


def add_dropout(small: PreTrainedConfig) -> None:
    """Sets every rate but that of skipped layers, which Python's random numbers choose; also in the parts' configs."""
    for name, value in vars(small).items():
        if isinstance(value, PreTrainedConfig):
            add_dropout(value)
        elif "drop" in name and isinstance(value, float):
            setattr(small, name, 0.0 if "layerdrop" in name else DROPOUT)


def tokens(length: int = LENGTH) -> torch.Tensor:
    """Random ids, none of which is special."""
    return torch.randint(END + 1, VOCABULARY, (BATCH, length))


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(BATCH, 3, size, size)


def built(auto: str, small: PreTrainedConfig, **call: Any) -> Built:
    """The model that the auto class names, in train mode."""
    model: nn.Module = getattr(transformers, auto).from_config(small)
    return model.train(), (), call


def text(auto: str, name: str, settings: Settings, target: int = LENGTH) -> Built:
    """A language model with one label a token, or with `target` labels for a decoder."""
    ids, labels = tokens(), tokens(target)
    call = {"input_ids": ids, "labels": labels}
    if name in PADDED:
        mask = torch.ones_like(ids)
        mask[1, -5:] = mask[3, -2:] = 0
        ids[mask == 0] = PAD
        labels[1, -5:] = labels[3, -2:] = -100
        call["attention_mask"] = mask
    return built(auto, config(name.removesuffix("-eager"), **settings), **call)


def image(name: str, settings: Settings) -> Built:
    """An image classifier."""
    small = config(name.removesuffix("-eager"), num_labels=CLASSES, **settings)
    labels = torch.randint(CLASSES, (BATCH,))
    return built("AutoModelForImageClassification", small, pixel_values=images(), labels=labels)


def speech(name: str, settings: Settings) -> Built:
    """A recogniser of speech with the CTC loss."""
    return built("AutoModelForCTC", config(name, **settings), input_values=torch.randn(BATCH, 800), labels=tokens(6))


def segformer() -> Built:
    """Segmentation: one label a pixel."""
    small = config(
        "segformer",
        num_labels=CLASSES,
        num_encoder_blocks=2,
        depths=[2, 2],
        sr_ratios=[4, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        decoder_hidden_size=32,
    )
    labels = torch.randint(CLASSES, (BATCH, 32, 32))
    return built("AutoModelForSemanticSegmentation", small, pixel_values=images(), labels=labels)


def detr() -> Built:
    """Detection without labels: its loss matches boxes on the host, with scipy."""
    backbone = config("resnet", **STAGES, out_features=["stage2"])
    small = config("detr", use_timm_backbone=False, backbone_config=backbone, num_queries=6, num_labels=CLASSES)
    return built("AutoModelForObjectDetection", small, pixel_values=images(64))


def whisper() -> Built:
    """Speech to text, from a spectrogram."""
    small = config("whisper", num_mel_bins=16, max_source_positions=20, max_target_positions=32)
    return built("AutoModelForSpeechSeq2Seq", small, input_features=torch.randn(BATCH, 16, 40), labels=tokens())


def contrastive(name: str, text_type: str, vision_type: str) -> Built:
    """Images and texts in one space, with the contrastive loss over the batch."""
    parts = {"text_config": config(text_type).to_dict(), "vision_config": config(vision_type).to_dict()}
    small = AutoConfig.for_model(name, **parts, projection_dim=16)
    return built("AutoModel", small, input_ids=tokens(), pixel_values=images(), return_loss=True)


def blip() -> Built:
    """Captions: a text decoder over an image encoder."""
    parts = {"text_config": config("blip_text_model").to_dict(), "vision_config": config("blip_vision_model").to_dict()}
    ids = tokens()
    small = AutoConfig.for_model("blip", **parts, projection_dim=16, image_text_hidden_size=16)
    return built("AutoModelForImageTextToText", small, input_ids=ids, pixel_values=images(), labels=ids)


# A name is a model type of transformers, with a suffix where the attention (and the experts) are not the default ones.
MODELS: dict[str, Callable[[], Built]] = {
    **{name: partial(text, "AutoModelForCausalLM", name, settings) for name, settings in CAUSAL.items()},
    **{name: partial(text, "AutoModelForMaskedLM", name, settings) for name, settings in MASKED.items()},
    **{name: partial(text, "AutoModelForSeq2SeqLM", name, settings, 12) for name, settings in SEQ2SEQ.items()},
    **{name: partial(image, name, settings) for name, settings in IMAGE.items()},
    **{name: partial(speech, name, settings) for name, settings in SPEECH.items()},
    "segformer": segformer,
    "detr": detr,
    "whisper": whisper,
    "clip": partial(contrastive, "clip", "clip_text_model", "clip_vision_model"),
    "siglip": partial(contrastive, "siglip", "siglip_text_model", "siglip_vision_model"),
    "blip": blip,
}
