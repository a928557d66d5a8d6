"""Training-step graphs of real models at real sizes, for benchmarks of the solver: `benchmarks/graphs/NAME.json.gz`.

    python -m benchmarks.corpus [NAME ...]

Models are built and captured under fake tensors, so that GPT-2 XL takes no more memory than its graph, and priced by the
estimate for a generic GPU, which depends on shapes alone: the files repeat exactly with one torch and one transformers.
A solver benchmark then needs neither. Dropout is off everywhere; the arithmetic is float32.
"""

import argparse
import gzip
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from examples import gpt2, resnet50, vit
from planner._compat.fake_tensors import fake_mode
from planner.graph.graph import Graph
from planner.graph.schedule import keep_all
from planner.graph.simulate import simulate
from planner.profiler.estimate import GENERIC_GPU, estimate
from planner.results.plan_file import dumps, load_graph
from planner.tracer.capture import capture
from planner.tracer.lower import kernel_nodes, lower

GRAPHS = Path(__file__).with_name("graphs")

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A model in training mode and the arguments of one training step."""


def convolution(channels_in: int, channels_out: int) -> nn.Sequential:
    """3x3 convolution, batch norm and in-place ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)
    )


class DenseLayer(nn.Module):
    """Reads all features so far, adds a few: the backward wants every concatenation again, which is quadratic to keep."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.reduce = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, 4 * growth, 1, bias=False)
        )
        self.grow = nn.Sequential(
            nn.BatchNorm2d(4 * growth), nn.ReLU(inplace=True), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.grow(self.reduce(torch.cat(list(features), dim=1)))


class DenseNet(nn.Module):
    """DenseNet-BC: blocks in which each layer reads all before it, halved in size and channels between blocks."""

    def __init__(self, layers: Sequence[int], growth: int, classes: int) -> None:
        super().__init__()
        channels = 2 * growth
        self.stem = nn.Sequential(resnet50.convolution(3, channels, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1))
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for depth in layers:
            self.blocks.append(nn.ModuleList(DenseLayer(channels + i * growth, growth) for i in range(depth)))
            channels += depth * growth
            shrink = [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)] if depth is not layers[-1] else []
            self.transitions.append(nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True), *shrink))
            channels = channels // 2 if shrink else channels
        self.classifier = nn.Linear(channels, classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.stem(images)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            features = [x]
            for layer in block:
                features.append(layer(features))
            x = transition(torch.cat(features, dim=1))
        return F.cross_entropy(self.classifier(x.mean(dim=(2, 3))), labels)


class UNet(nn.Module):
    """Skips that live from the first convolution of the forward to the last of the backward."""

    def __init__(self, levels: int, width: int, classes: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels + 1)]
        pairs = list(pairwise(widths))

        def double(channels_in: int, channels_out: int) -> nn.Sequential:
            return nn.Sequential(convolution(channels_in, channels_out), convolution(channels_out, channels_out))

        self.down = nn.ModuleList(double(a, b) for a, b in pairwise([3, *widths[:-1]]))
        self.bottom = double(*pairs[-1])
        self.up = nn.ModuleList(nn.ConvTranspose2d(wide, narrow, 2, 2) for narrow, wide in reversed(pairs))
        self.merge = nn.ModuleList(double(wide, narrow) for narrow, wide in reversed(pairs))
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x, skips = images, []
        for block in self.down:
            skips.append(block(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.bottom(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], dim=1))
        return F.cross_entropy(self.classifier(x), labels)


class Residual(nn.Module):
    """Two convolutions beside a shortcut, told the time of the diffusion between them; self-attention where asked for."""

    def __init__(self, channels_in: int, channels: int, time_width: int, attends: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(32, channels_in), nn.SiLU(), nn.Conv2d(channels_in, channels, 3, padding=1))
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(time_width, channels))
        self.second = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))
        self.shortcut = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)
        self.attention = SelfAttention(channels) if attends else nn.Identity()

    def forward(self, x: Tensor, when: Tensor) -> Tensor:
        y = self.first(x) + self.time(when)[:, :, None, None]
        return self.attention(self.shortcut(x) + self.second(y))


class SelfAttention(nn.Module):
    """Every pixel attends to every other, in heads of 64 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        self.project = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(self.norm(x)).flatten(2).unflatten(1, (3, -1, 64)).transpose(3, 4)
        attended = F.scaled_dot_product_attention(*heads.contiguous().unbind(1))
        return x + self.out(attended.transpose(2, 3).reshape(x.shape))


class DiffusionUNet(nn.Module):
    """The denoiser of DDPM: two residual blocks a level on the way down, three on the way up, and a skip for each of these."""

    frequencies: Tensor

    def __init__(self, base: int, multipliers: Sequence[int], attending_levels: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, -9.2, base // 2)))
        self.time = nn.Sequential(nn.Linear(base, 4 * base), nn.SiLU(), nn.Linear(4 * base, 4 * base))
        self.stem = nn.Conv2d(3, base, 3, padding=1)
        widths = [base * multiplier for multiplier in multipliers]
        block = partial(Residual, time_width=4 * base)
        self.down, self.up, skips, channels = nn.ModuleList(), nn.ModuleList(), [base], base
        for level, width in enumerate(widths):
            attends = level >= len(widths) - attending_levels
            last = level == len(widths) - 1
            for _ in range(2):
                self.down.append(block(channels, width, attends=attends))
                channels = width
                skips.append(width)
            if not last:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        self.middle = nn.ModuleList([block(channels, channels, attends=True), block(channels, channels, attends=False)])
        for level, width in reversed(list(enumerate(widths))):
            attends = level >= len(widths) - attending_levels
            for _ in range(3):
                self.up.append(block(channels + skips.pop(), width, attends=attends))
                channels = width
            if level > 0:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)))
        self.out = nn.Sequential(nn.GroupNorm(32, base), nn.SiLU(), nn.Conv2d(base, 3, 3, padding=1))

    def forward(self, noised: Tensor, steps: Tensor, noise: Tensor) -> Tensor:
        angles = steps[:, None] * self.frequencies
        when = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        x = self.stem(noised)
        skips = [x]
        for layer in self.down:
            x = layer(x, when) if isinstance(layer, Residual) else layer(x)
            skips.append(x)
        for layer in self.middle:
            x = layer(x, when)
        for layer in self.up:
            x = layer(torch.cat([x, skips.pop()], dim=1), when) if isinstance(layer, Residual) else layer(x)
        return F.mse_loss(self.out(x), noise)


class GRU(nn.Module):
    """A GRU cell unrolled in Python, with a readout and a loss at every step: a long chain, weights read at every link."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.inner, self.outer = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.readout = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        embedded = self.embedding(tokens)
        state, losses = torch.zeros_like(embedded[0]), []
        for x, target in zip(embedded, targets, strict=True):
            state = self.cell(x, state)
            losses.append(F.cross_entropy(self.readout(state), target))
        return torch.stack(losses).mean()

    def cell(self, x: Tensor, state: Tensor) -> Tensor:
        reset, update, candidate = self.outer(x).chunk(3, dim=1)
        inner_reset, inner_update, inner_candidate = self.inner(state).chunk(3, dim=1)
        candidate = torch.tanh(candidate + torch.sigmoid(reset + inner_reset) * inner_candidate)
        return candidate + torch.sigmoid(update + inner_update) * (state - candidate)


class Loss(nn.Module):
    """The loss alone of a model of transformers, whose full output would keep the logits to the end of the step."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Tensor:
        return self.model(**batch).loss


def attending(attention: str, build: Callable[..., Call], **sizes: Any) -> Call:
    """A model of transformers with attention from matrix products ("eager") or from one fused kernel ("sdpa")."""
    model, args, kwargs = build(**sizes, dropout=0.0)
    model.set_attn_implementation(attention)
    return model, args, kwargs


def gpt(attention: str, layers: int, width: int, heads: int, batch: int, length: int = 1024, vocabulary: int = 50257) -> Call:
    return attending(
        attention, gpt2.build, layers=layers, width=width, heads=heads, batch=batch, length=length, vocabulary=vocabulary
    )


def llama(layers: int, width: int, intermediate: int, heads: int, length: int, batch: int) -> Call:
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        max_position_embeddings=length,
        vocab_size=32000,
        use_cache=False,
    )
    tokens = torch.randint(config.vocab_size, (batch, length))
    return LlamaForCausalLM(config).train(), (), {"input_ids": tokens, "labels": tokens}


def t5(layers: int, width: int, heads: int, length: int, batch: int) -> Call:
    """An encoder whose last output, and position biases, every layer of the decoder reads."""
    config = T5Config(
        num_layers=layers,
        num_decoder_layers=layers,
        d_model=width,
        d_kv=width // heads,
        d_ff=4 * width,
        num_heads=heads,
        vocab_size=32128,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        use_cache=False,
    )
    tokens, labels = torch.randint(config.vocab_size, (2, batch, length)).unbind()
    return T5ForConditionalGeneration(config).train(), (), {"input_ids": tokens, "labels": labels}


def densenet(layers: Sequence[int], growth: int, pixels: int, batch: int) -> Call:
    images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(1000, (batch,))
    return DenseNet(layers, growth, 1000).train(), (images, labels), {}


def unet(levels: int, width: int = 64, pixels: int = 256, batch: int = 8, classes: int = 4) -> Call:
    images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(classes, (batch, pixels, pixels))
    return UNet(levels, width, classes).train(), (images, labels), {}


def diffusion(base: int, multipliers: Sequence[int], pixels: int, batch: int) -> Call:
    noised, noise = torch.randn(2, batch, 3, pixels, pixels).unbind()
    return DiffusionUNet(base, multipliers, attending_levels=2).train(), (noised, torch.rand(batch), noise), {}


def rnn(width: int, steps: int, batch: int, vocabulary: int = 1000) -> Call:
    tokens, targets = torch.randint(vocabulary, (2, steps, batch)).unbind()
    return GRU(width, vocabulary).train(), (tokens, targets), {}


VIT_L = {"layers": 24, "width": 1024, "heads": 16, "batch": 32, "classes": 1000}

MODELS: Mapping[str, Callable[[], Call]] = {
    "gpt2-1": partial(gpt, "eager", 1, 256, 4, batch=4, length=256, vocabulary=512),
    "gpt2-2": partial(gpt, "eager", 2, 256, 4, batch=4, length=256, vocabulary=512),
    "gpt2-medium-eager": partial(gpt, "eager", 24, 1024, 16, batch=8),
    "gpt2-medium-fused": partial(gpt, "sdpa", 24, 1024, 16, batch=8),
    "gpt2-xl-eager": partial(gpt, "eager", 48, 1600, 25, batch=4),
    "gpt2-xl-fused": partial(gpt, "sdpa", 48, 1600, 25, batch=4),
    "gpt-96": partial(gpt, "sdpa", 96, 1536, 16, batch=2),
    "gpt-192": partial(gpt, "eager", 192, 1024, 16, batch=1),
    "llama-32": partial(llama, layers=32, width=2048, intermediate=5504, heads=16, length=2048, batch=1),
    "vit-l": partial(attending, "sdpa", vit.build, **VIT_L),
    "vit-l-eager": partial(attending, "eager", vit.build, **VIT_L),
    "encoder-decoder": partial(t5, layers=12, width=768, heads=12, length=512, batch=8),
    "resnet50": partial(resnet50.build, layers=(3, 4, 6, 3), batch=32),
    "resnet152": partial(resnet50.build, layers=(3, 8, 36, 3), batch=32),
    "densenet121": partial(densenet, layers=(6, 12, 24, 16), growth=32, pixels=224, batch=32),
    "unet-4": partial(unet, levels=4),
    "unet-5": partial(unet, levels=5),
    "diffusion-unet": partial(diffusion, base=128, multipliers=(1, 2, 2, 4), pixels=64, batch=8),
    "rnn": partial(rnn, width=1024, steps=100, batch=64),
}


def build(name: str) -> Call:
    """The named model and its batch as fake tensors: shapes without storage.

    Transformers leaves out setting initial values: there is nowhere to write them, and it would read some back.
    """
    with fake_mode(), mock.patch.object(PreTrainedModel, "initialize_weights"):
        model, args, kwargs = MODELS[name]()
    return Loss(model) if isinstance(model, PreTrainedModel) else model, args, kwargs


def graph_of(call: Call) -> Graph:
    """The graph of a training step, priced for a GPU even though the fake tensors say CPU."""
    joint = capture(*call)
    return lower(joint, estimate(kernel_nodes(joint), GENERIC_GPU))


def graph_path(name: str) -> Path:
    return GRAPHS / f"{name}.json.gz"


def write(name: str) -> str:
    """Capture the named model, write its file, read it back; a row of the table."""
    start = time.perf_counter()
    graph = graph_of(build(name))
    seconds = time.perf_counter() - start
    path = graph_path(name)
    path.write_bytes(gzip.compress(dumps(graph).encode(), mtime=0))  # no date in the file, so that it repeats
    if load_graph(path) != graph:
        raise RuntimeError(f"{path} does not read back as the graph of {name} that was written")
    peak_gib = simulate(graph, keep_all(graph)).peak_bytes / 2**30
    kib = path.stat().st_size / 2**10
    return f"{name:<18} {len(graph.ops):>6} {graph.num_forward_ops:>8} {peak_gib:>9.2f} {kib:>9.1f} {seconds:>8.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(MODELS)}")
    names = parser.parse_args().names or list(MODELS)
    if unknown := sorted(set(names) - set(MODELS)):
        parser.error(f"no model is called {', '.join(unknown)}; there are {', '.join(MODELS)}")
    GRAPHS.mkdir(exist_ok=True)
    print(f"{'name':<18} {'ops':>6} {'forward':>8} {'peak GiB':>9} {'file KiB':>9} {'seconds':>8}")
    for name in names:
        print(write(name), flush=True)


if __name__ == "__main__":
    main()
