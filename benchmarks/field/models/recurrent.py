"""Networks that carry state from call to call: spiking neurons, liquid networks, graph memories, recurrent memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.field.case import Batch, Registry, Setup, batches, call, on_output
from benchmarks.field.models.language import VOCABULARY, next_token

CASES = Registry(__name__)


def _spikes(count: int = 6) -> tuple[Batch, ...]:
    return batches(lambda: call(torch.randn(count, 10), target=torch.randint(4, (count,))))


@CASES("snntorch")
def spiking_own_loop() -> Setup:
    """The membrane potentials are reset at the start, as snntorch's tutorials write it."""
    import snntorch

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(10, 20), nn.Linear(20, 4)
            self.lif1, self.lif2 = (snntorch.Leaky(beta=0.9, learn_beta=learned) for learned in (True, False))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mem1, mem2, record = self.lif1.init_leaky(), self.lif2.init_leaky(), []
            for _ in range(4):
                spikes, mem1 = self.lif1(self.fc1(x), mem1)
                spikes, mem2 = self.lif2(self.fc2(spikes), mem2)
                record.append(mem2)
            return torch.stack(record)

    def loss(module: nn.Module, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return sum((F.cross_entropy(step, target) for step in out), torch.zeros(()))

    return Setup(Net(), _spikes(), loss)


@CASES("snntorch")
def spiking_hidden_state() -> Setup:
    """The neurons keep their state as attributes; the forward resets it first."""
    import snntorch
    from snntorch import utils

    hidden = {"beta": 0.9, "init_hidden": True}
    net = nn.Sequential(nn.Linear(10, 20), snntorch.Leaky(**hidden), nn.Linear(20, 4), snntorch.Leaky(**hidden, output=True))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            utils.reset(self.net)
            return torch.stack([self.net(x)[1] for _ in range(4)]).mean(0)

    # snntorch resets what it finds in a list of all neurons ever made, in which a copy's are not
    return Setup(Net(), _spikes(), on_output(F.cross_entropy), copied=False)


def _spiking() -> nn.Module:
    from spikingjelly.activation_based import layer, neuron, surrogate

    neurons = [neuron.LIFNode(tau=2.0, v_threshold=0.2, surrogate_function=surrogate.ATan()) for _ in range(2)]
    return nn.Sequential(layer.Linear(10, 20), neurons[0], layer.Linear(20, 4), neurons[1])


@CASES("spikingjelly")
def spiking_reset_by_the_loop() -> Setup:
    """The membrane potential is carried over the time steps of one call, and reset after the optimizer's step."""
    from spikingjelly.activation_based import functional

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _spiking()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([self.net(x) for _ in range(4)]).mean(0)

    def reset(module: Any, step: int) -> None:
        functional.reset_net(getattr(module, "original", module))

    return Setup(Net(), _spikes(), on_output(F.cross_entropy), after_step=reset)


@CASES("spikingjelly")
def spiking_carried_on() -> Setup:
    """Truncated backpropagation: the potential goes on into the next batch, detached by the loop."""
    from spikingjelly.activation_based import functional

    def detach(module: Any, step: int) -> None:
        functional.detach_net(getattr(module, "original", module))

    return Setup(_spiking(), _spikes(), on_output(F.cross_entropy), after_step=detach)


@CASES("ncps")
def closed_form_continuous() -> Setup:
    from ncps.torch import CfC
    from ncps.wirings import AutoNCP

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = CfC(6, AutoNCP(16, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(x)[0]

    data = batches(lambda: call(torch.randn(2, 5, 6), target=torch.randn(2, 5, 2)))
    return Setup(Net(), data, on_output(F.mse_loss))


@CASES("ncps")
def liquid_time_constant() -> Setup:
    """The hidden state is handed from batch to batch by the loop."""
    from ncps.torch import LTC

    def forward(module: nn.Module, batch: Batch) -> tuple[Any, torch.Tensor]:
        out, hidden = module(*batch.args)
        return (out, hidden), F.mse_loss(out, batch.target) + 0.1 * hidden.square().mean()

    data = batches(lambda: call(torch.randn(2, 5, 6), torch.zeros(2, 8), target=torch.randn(2, 5, 8)))
    return Setup(LTC(6, 8, ode_unfolds=2), data, forward=forward)


@CASES("x-transformers")
def transformer_xl() -> Setup:
    """Memories of the last segment are an argument and an output."""
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=2, heads=2, attn_dim_head=16, rel_pos_bias=True)
    net = TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=16, max_mem_len=8, attn_layers=layers)

    class Xl(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, ids: torch.Tensor, memories: list[torch.Tensor]) -> Any:
            return self.net(ids, mems=memories, return_mems=True)

    def make() -> Batch:
        ids = torch.randint(VOCABULARY, (2, 16))
        return call(ids, [torch.randn(2, 8, 32) for _ in range(2)], target=ids)

    return Setup(Xl(), batches(make), lambda module, out, target: next_token(module, out[0], target))


@CASES("torch-geometric")
def temporal_graph_memory() -> Setup:
    """TGN: messages are stored in dicts on the module, and the next call reads them."""
    from torch_geometric.nn import TGNMemory
    from torch_geometric.nn.models.tgn import IdentityMessage, LastAggregator

    class Tgn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            message = IdentityMessage(raw_msg_dim=3, memory_dim=8, time_dim=4)
            self.memory = TGNMemory(12, 3, 8, 4, message_module=message, aggregator_module=LastAggregator())
            self.head = nn.Linear(16, 1)

        def forward(self, source: torch.Tensor, target: torch.Tensor, t: torch.Tensor, message: torch.Tensor) -> torch.Tensor:
            z, _ = self.memory(torch.arange(12))
            score = self.head(torch.cat([z[source], z[target]], 1))
            self.memory.update_state(source, target, t, message)
            return score

    def detach(module: Any, step: int) -> None:
        module.memory.detach()

    def make() -> Batch:
        ends = (torch.randint(12, (6,)), torch.randint(12, (6,)))
        return call(*ends, torch.arange(6), torch.randn(6, 3), target=torch.rand(6, 1).round())

    return Setup(Tgn(), batches(make), on_output(F.binary_cross_entropy_with_logits), after_step=detach)
