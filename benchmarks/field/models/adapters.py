"""Parameter-efficient fine-tuning: peft, loralib."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.field.case import Batch, Registry, Setup, batches, call
from benchmarks.field.models.language import VOCABULARY, next_token, next_tokens

CASES = Registry(__name__)


def _labelled(length: int = 16) -> tuple[Batch, ...]:
    def make() -> Batch:
        ids = torch.randint(VOCABULARY, (2, length))
        return call(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)

    return batches(make)


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    config = GPT2Config(vocab_size=VOCABULARY, **size, bos_token_id=0, eos_token_id=0, use_cache=False)
    return GPT2LMHeadModel(config)


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, **size, num_key_value_heads=2, max_position_embeddings=32, use_cache=False)
    return LlamaForCausalLM(config)


def _adapted(model: nn.Module, config: Any) -> Setup:
    from peft import get_peft_model

    return Setup(get_peft_model(model, config), _labelled())


@CASES("peft")
def lora_gpt2() -> Setup:
    from peft import LoraConfig

    return _adapted(_gpt2(), LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.1, fan_in_fan_out=True))


@CASES("peft")
def lora_llama_checkpointed() -> Setup:
    """The usual pair: LoRA, and the model's own gradient checkpointing with inputs that require grad."""
    from peft import LoraConfig

    model = _llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return _adapted(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]))


@CASES("peft")
def dora_llama() -> Setup:
    from peft import LoraConfig

    return _adapted(_llama(), LoraConfig(task_type="CAUSAL_LM", r=4, use_dora=True, target_modules=["q_proj", "v_proj"]))


@CASES("peft")
def ia3_llama() -> Setup:
    from peft import IA3Config

    layers = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    return _adapted(_llama(), IA3Config(task_type="CAUSAL_LM", **layers))


@CASES("peft")
def adalora_llama() -> Setup:
    """Ranks are reallocated between steps from the gradients; the orthogonality loss is added by the model."""
    from peft import AdaLoraConfig, get_peft_model

    schedule = {"init_r": 4, "target_r": 2, "tinit": 0, "tfinal": 1, "deltaT": 1, "total_step": 10}
    config = AdaLoraConfig(task_type="CAUSAL_LM", **schedule, target_modules=["q_proj", "v_proj"])
    return Setup(get_peft_model(_llama(), config), _labelled())


@CASES("peft")
def prompt_tuning() -> Setup:
    from peft import PromptTuningConfig

    return _adapted(_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


@CASES("peft")
def prefix_tuning() -> Setup:
    """Trained keys and values enter as a cache, which comes out again, and is left out of a planned output."""
    from peft import PrefixTuningConfig

    setup = _adapted(_llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    return replace(setup, left_out=("output(len)", "output['past_key_values']", "output.past_key_values"))


@CASES("peft")
def vera_llama() -> Setup:
    from peft import VeraConfig

    return _adapted(_llama(), VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], vera_dropout=0.1))


@CASES("loralib")
def lora_layers() -> Setup:
    """Layers that merge their weights on eval() and split them again on train()."""
    import loralib

    layers = [loralib.Linear(32, 64, r=4, lora_dropout=0.1), nn.GELU(), loralib.Linear(64, 32, r=4)]
    merged = loralib.MergedLinear(32, 96, r=4, enable_lora=[True, False, True])
    model = nn.Sequential(loralib.Embedding(VOCABULARY, 32, r=4), *layers, merged, nn.Linear(96, VOCABULARY))
    loralib.mark_only_lora_as_trainable(model, bias="lora_only")
    model.eval()
    return Setup(model, next_tokens(16), next_token)
