"""Diffusion and flow matching: diffusers, denoising-diffusion-pytorch, rectified-flow-pytorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.field.case import Batch, Registry, Setup, batches, call

CASES = Registry(__name__)


def _sample_mse(module: nn.Module, out: Any, target: torch.Tensor) -> torch.Tensor:
    """Noise prediction."""
    return F.mse_loss((out[0] if isinstance(out, tuple) else out.sample).float(), target)


def _noised(shape: tuple[int, ...], **conditions: Any) -> tuple[Batch, ...]:
    """A noised sample, its timestep and its noise, by diffusers' scheduler."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=1000)

    def make() -> Batch:
        clean, noise, steps = torch.randn(shape), torch.randn(shape), torch.randint(1000, (shape[0],))
        given = {name: torch.randn(size) for name, size in conditions.items()}
        return call(scheduler.add_noise(clean, noise, steps), steps, **given, target=noise)

    return batches(make)


_BLOCKS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 16}


@CASES("diffusers")
def unet_2d() -> Setup:
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    model = UNet2DModel(in_channels=3, out_channels=3, attention_head_dim=8, dropout=0.1, **blocks, **_BLOCKS)
    return Setup(model, _noised((2, 3, 16, 16)), _sample_mse)


def _conditioned() -> nn.Module:
    from diffusers import UNet2DConditionModel

    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**_BLOCKS, **blocks, cross_attention_dim=24, attention_head_dim=8)


@CASES("diffusers")
def unet_conditioned() -> Setup:
    return Setup(_conditioned(), _noised((2, 4, 16, 16), encoder_hidden_states=(2, 5, 24)), _sample_mse)


@CASES("diffusers")
def unet_conditioned_tuple() -> Setup:
    """As diffusers' own training scripts call it: return_dict=False, [0]."""
    data = _noised((2, 4, 16, 16), encoder_hidden_states=(2, 5, 24))
    data = tuple(Batch(batch.args, {**batch.kwargs, "return_dict": False}, batch.target) for batch in data)
    return Setup(_conditioned(), data, _sample_mse)


@CASES("diffusers")
def unet_lora() -> Setup:
    """Frozen but for LoRA weights in the attention, as in train_text_to_image_lora.py."""
    from peft import LoraConfig

    model = _conditioned()
    model.requires_grad_(False)
    layers = ["to_k", "to_q", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=layers))
    data = _noised((2, 4, 16, 16), encoder_hidden_states=(2, 5, 24))
    data = tuple(Batch(batch.args, {**batch.kwargs, "return_dict": False}, batch.target) for batch in data)
    return Setup(model, data, _sample_mse)


@CASES("diffusers")
def controlnet() -> Setup:
    """A ControlNet's residuals enter a frozen UNet."""
    from diffusers import ControlNetModel

    class Controlled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = _conditioned().requires_grad_(False)
            self.control = ControlNetModel.from_unet(self.unet, conditioning_channels=3)

        def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, hint: torch.Tensor) -> torch.Tensor:
            down, mid = self.control(x, t, text, hint, return_dict=False)
            more = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            sample: torch.Tensor = self.unet(x, t, text, **more, return_dict=False)[0]
            return sample

    noised = _noised((2, 4, 16, 16), text=(2, 5, 24), hint=(2, 3, 128, 128))
    return Setup(Controlled(), noised, lambda module, out, target: F.mse_loss(out, target))


@CASES("diffusers")
def autoencoder_kl() -> Setup:
    """Encode, sample the posterior, decode, with the KL term."""
    from diffusers import AutoencoderKL

    class Vae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
            self.vae = AutoencoderKL(latent_channels=4, **blocks, **_BLOCKS)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            posterior = self.vae.encode(x).latent_dist
            return self.vae.decode(posterior.sample()).sample, posterior.kl().mean()

    def loss(module: nn.Module, out: Any, target: torch.Tensor) -> torch.Tensor:
        return F.l1_loss(out[0], target) + 1e-3 * out[1]

    def make() -> Batch:
        image = torch.randn(2, 3, 16, 16)
        return call(image, target=image)

    return Setup(Vae(), batches(make), loss)


@CASES("diffusers")
def vq_model() -> Setup:
    """The quantizer's commitment loss comes out beside the sample."""
    from diffusers import VQModel

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = VQModel(**blocks, **_BLOCKS, latent_channels=4, num_vq_embeddings=16)

    def loss(module: nn.Module, out: Any, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(out.sample, target) + out.commit_loss.mean()

    def make() -> Batch:
        image = torch.randn(2, 3, 16, 16)
        return call(image, target=image)

    return Setup(model, batches(make), loss)


@CASES("diffusers")
def diffusion_transformer() -> Setup:
    from diffusers import DiTTransformer2DModel

    size = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    model = DiTTransformer2DModel(**size, in_channels=4, out_channels=4, norm_num_groups=8, num_embeds_ada_norm=20)

    def make() -> Batch:
        noise, label = torch.randn(2, 4, 8, 8), torch.randint(10, (2,))
        return call(torch.randn(2, 4, 8, 8), torch.randint(1000, (2,)), label, target=noise)

    return Setup(model, batches(make), _sample_mse)


@CASES("diffusers")
def stable_diffusion_3() -> Setup:
    from diffusers import SD3Transformer2DModel

    size = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4, "sample_size": 8, "patch_size": 2}
    text = {"joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 16}
    model = SD3Transformer2DModel(**size, **text, in_channels=4, out_channels=4, pos_embed_max_size=16)

    def make() -> Batch:
        text = {"encoder_hidden_states": torch.randn(2, 5, 24), "pooled_projections": torch.randn(2, 16)}
        velocity = torch.randn(2, 4, 8, 8)
        return call(torch.randn(2, 4, 8, 8), timestep=torch.rand(2) * 1000, **text, target=velocity)

    return Setup(model, batches(make), _sample_mse)


@CASES("diffusers")
def flux() -> Setup:
    from diffusers import FluxTransformer2DModel

    size = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    text = {"joint_attention_dim": 24, "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8)}
    model = FluxTransformer2DModel(patch_size=1, in_channels=4, **size, **text, guidance_embeds=True)

    def make() -> Batch:
        text = {"encoder_hidden_states": torch.randn(2, 5, 24), "pooled_projections": torch.randn(2, 16)}
        ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
        time = {"timestep": torch.rand(2), "guidance": torch.full((2,), 3.5)}
        return call(torch.randn(2, 16, 4), **text, **ids, **time, return_dict=False, target=torch.randn(2, 16, 4))

    return Setup(model, batches(make), _sample_mse)


def _unet() -> nn.Module:
    from denoising_diffusion_pytorch import Unet

    return Unet(dim=16, dim_mults=(1, 2), flash_attn=False, dropout=0.1, attn_dim_head=8, attn_heads=2)


@CASES("denoising-diffusion-pytorch")
def gaussian_diffusion() -> Setup:
    from denoising_diffusion_pytorch import GaussianDiffusion

    model = GaussianDiffusion(_unet(), image_size=16, timesteps=100)
    return Setup(model, batches(lambda: call(torch.rand(2, 3, 16, 16))))


@CASES("denoising-diffusion-pytorch")
def gaussian_diffusion_self_conditioned() -> Setup:
    """Every second step, by Python's generator, conditions on its own prediction."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    unet = Unet(dim=16, dim_mults=(1, 2), self_condition=True, attn_dim_head=8, attn_heads=2)
    model = GaussianDiffusion(unet, image_size=16, timesteps=100)
    return Setup(model, batches(lambda: call(torch.rand(2, 3, 16, 16))))


@CASES("denoising-diffusion-pytorch")
def elucidated_diffusion() -> Setup:
    from denoising_diffusion_pytorch import ElucidatedDiffusion, Unet

    unet = Unet(dim=16, dim_mults=(1, 2), learned_sinusoidal_cond=True, random_fourier_features=True, attn_dim_head=8)
    model = ElucidatedDiffusion(unet, image_size=16, num_sample_steps=4)
    return Setup(model, batches(lambda: call(torch.rand(2, 3, 16, 16))))


@CASES("rectified-flow-pytorch")
def rectified_flow() -> Setup:
    from rectified_flow_pytorch import RectifiedFlow, Unet

    model = RectifiedFlow(Unet(dim=16, dim_mults=(1, 2), attn_dim_head=8, attn_heads=2))
    return Setup(model, batches(lambda: call(torch.rand(2, 3, 16, 16))))
