"""Graphs and point clouds: torch_geometric, egnn-pytorch, e3nn, equiformer-pytorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.field.case import Batch, Registry, Setup, batches, call, on_output

CASES = Registry(__name__)
NODES, EDGES, FEATURES, CLASSES = 30, 80, 12, 4
PYG = "torch-geometric"


def _graph(relations: int = 0) -> tuple[Batch, ...]:
    """One graph with a class for each node; only the features change from step to step."""
    edges = torch.randint(NODES, (2, EDGES))
    kinds = (torch.randint(relations, (EDGES,)),) if relations else ()
    target = torch.randint(CLASSES, (NODES,))
    return batches(lambda: call(torch.randn(NODES, FEATURES), edges, *kinds, target=target))


def _masked_nll(module: nn.Module, out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Node classification on the training nodes."""
    return F.cross_entropy(out[:20], target[:20])


@CASES(PYG)
def gcn() -> Setup:
    from torch_geometric.nn import GCN

    return Setup(GCN(FEATURES, 16, num_layers=2, out_channels=CLASSES, dropout=0.5), _graph(), _masked_nll)


@CASES(PYG)
def gcn_cached() -> Setup:
    """The first call normalizes the edges and keeps them on the layer."""
    from torch_geometric.nn import GCN

    return Setup(GCN(FEATURES, 16, num_layers=2, out_channels=CLASSES, cached=True), _graph(), _masked_nll)


@CASES(PYG)
def gat() -> Setup:
    from torch_geometric.nn import GAT

    return Setup(GAT(FEATURES, 16, num_layers=2, out_channels=CLASSES, heads=2, dropout=0.3), _graph(), _masked_nll)


@CASES(PYG)
def graph_sage_jumping() -> Setup:
    from torch_geometric.nn import GraphSAGE

    model = GraphSAGE(FEATURES, 16, num_layers=3, out_channels=CLASSES, jk="cat", norm="batch_norm")
    return Setup(model, _graph(), _masked_nll)


@CASES(PYG)
def relational() -> Setup:
    from torch_geometric.nn import RGCNConv

    class Relational(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = RGCNConv(FEATURES, 16, num_relations=3, num_bases=2)
            self.second = RGCNConv(16, CLASSES, num_relations=3, num_bases=2)

        def forward(self, x: torch.Tensor, edges: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
            return self.second(F.relu(self.first(x, edges, kinds)), edges, kinds)

    return Setup(Relational(), _graph(3), _masked_nll)


@CASES(PYG)
def graph_classifier() -> Setup:
    """GIN on a Batch of graphs, pooled by batch index: the argument is a torch_geometric object."""
    from torch_geometric.data import Batch as Graphs
    from torch_geometric.data import Data
    from torch_geometric.nn import GIN, global_add_pool

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = GIN(FEATURES, 16, num_layers=2, dropout=0.2, norm="batch_norm"), nn.Linear(16, CLASSES)

        def forward(self, x: torch.Tensor, edges: torch.Tensor, graph: torch.Tensor, size: int) -> torch.Tensor:
            return self.head(global_add_pool(self.body(x, edges), graph, size))

    def make() -> Batch:
        several = [Data(x=torch.randn(8, FEATURES), edge_index=torch.randint(8, (2, 20))) for _ in range(3)]
        graphs = Graphs.from_data_list(several)
        return call(graphs.x, graphs.edge_index, graphs.batch, 3, target=torch.randint(CLASSES, (3,)))

    return Setup(Classifier(), batches(make), on_output(F.cross_entropy))


@CASES(PYG, precisions=("fp32",))  # sparse products know no bfloat16
def graph_unet_top_k() -> Setup:
    """Pooling keeps a share of the nodes and whatever edges are left: shapes follow the data."""
    from torch_geometric.nn import GraphUNet

    return Setup(GraphUNet(FEATURES, 16, CLASSES, depth=2, pool_ratios=0.5), _graph(), _masked_nll)


@CASES(PYG)
def variational_autoencoder() -> Setup:
    """VGAE leaves its mean and log deviation on itself; the loss reads them, and samples negative edges."""
    from torch_geometric.nn import VGAE, GCNConv

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.mu, self.logstd = GCNConv(FEATURES, 16), GCNConv(16, 8), GCNConv(16, 8)

        def forward(self, x: torch.Tensor, edges: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.shared(x, edges).relu()
            return self.mu(x, edges), self.logstd(x, edges)

    class Vgae(VGAE):
        def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.encode(x, edges)
            return out

    edges = torch.randint(NODES, (2, EDGES))

    def loss(module: Any, out: torch.Tensor, target: Any) -> torch.Tensor:
        value: torch.Tensor = module.recon_loss(out, edges) + module.kl_loss() / NODES
        return value

    return Setup(Vgae(Encoder()), batches(lambda: call(torch.randn(NODES, FEATURES), edges)), loss)


@CASES(PYG)
def deep_graph_infomax() -> Setup:
    from torch_geometric.nn import DeepGraphInfomax, GCNConv

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = GCNConv(FEATURES, 16)

        def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
            return F.prelu(self.conv(x, edges), torch.full((1,), 0.25))

    def corrupted(x: torch.Tensor, edges: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[torch.randperm(x.size(0))], edges

    def summary(z: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.sigmoid(z.mean(dim=0))

    model = DeepGraphInfomax(hidden_channels=16, encoder=Encoder(), summary=summary, corruption=corrupted)
    return Setup(model, _graph(), lambda module, out, target: module.loss(*out))


def _molecule(count: int = 12) -> Batch:
    atoms, places = torch.randint(1, 9, (count,)), torch.rand(count, 3) * 3
    return call(atoms, places, torch.arange(count) // (count // 2), target=torch.randn(2, 1))


@CASES(PYG)
def schnet() -> Setup:
    """Edges by distance: how many there are follows the data."""
    from torch_geometric.nn import SchNet

    def interaction(places: torch.Tensor, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        near = (torch.cdist(places, places) < 2.0) & (batch[:, None] == batch[None])
        edges = (near & ~torch.eye(len(places), dtype=torch.bool)).nonzero().T
        return edges, (places[edges[0]] - places[edges[1]]).norm(dim=-1)

    size = {"hidden_channels": 16, "num_filters": 16, "num_interactions": 2, "num_gaussians": 10}
    model = SchNet(**size, interaction_graph=interaction)
    return Setup(model, batches(_molecule), on_output(F.l1_loss))


@CASES(PYG)
def transformer_convolution() -> Setup:
    from torch_geometric.nn import TransformerConv

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = TransformerConv(FEATURES, 8, heads=2, dropout=0.2, beta=True)
            self.second = TransformerConv(16, CLASSES, heads=1)

        def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x, edges).relu(), edges)

    return Setup(Net(), _graph(), _masked_nll)


@CASES("egnn-pytorch")
def egnn() -> Setup:
    from egnn_pytorch import EGNN_Network

    model = EGNN_Network(num_tokens=10, num_positions=16, dim=16, depth=2, num_nearest_neighbors=4)

    def make() -> Batch:
        places = torch.randn(1, 16, 3)
        return call(torch.randint(10, (1, 16)), places, mask=torch.ones(1, 16, dtype=torch.bool), target=places)

    return Setup(model, batches(make), lambda module, out, target: F.mse_loss(out[1], target) + out[0].square().mean())


@CASES("e3nn")
def equivariant_network() -> Setup:
    """Compiled TorchScript tensor products inside."""
    from e3nn import o3
    from e3nn.nn import FullyConnectedNet, Gate

    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sphere = o3.Irreps.spherical_harmonics(2)
            self.gate = Gate("8x0e", [torch.tanh], "4x0e", [torch.sigmoid], "4x1o")
            self.product = o3.FullyConnectedTensorProduct("4x0e", self.sphere, self.gate.irreps_in, shared_weights=False)
            self.weights = FullyConnectedNet([6, 16, self.product.weight_numel], torch.nn.functional.silu)
            self.head = o3.Linear(self.gate.irreps_out, "1x1o")

        def forward(self, x: torch.Tensor, places: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
            source, target = edges
            apart = places[target] - places[source]
            harmonics = o3.spherical_harmonics(self.sphere, apart, True, normalization="component")
            radial = torch.cos(apart.norm(dim=1)[:, None] * torch.arange(1, 7))
            messages = self.product(x[source], harmonics, self.weights(radial))
            summed = torch.zeros(len(x), messages.shape[1], dtype=messages.dtype).index_add(0, target, messages)
            return self.head(self.gate(summed))

    edges = torch.randint(NODES, (2, EDGES))
    edges = edges[:, edges[0] != edges[1]]

    def make() -> Batch:
        return call(torch.randn(NODES, 4), torch.randn(NODES, 3), edges, target=torch.randn(NODES, 3))

    return Setup(Convolution(), batches(make), on_output(F.mse_loss))
