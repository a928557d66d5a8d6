"""Operators, differential equations, Gaussian processes, probabilistic programs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.field.case import Batch, Registry, Setup, batches, call, on_output

CASES = Registry(__name__)


def _fields(side: int = 16) -> tuple[Batch, ...]:
    return batches(lambda: call(torch.randn(2, 1, side, side), target=torch.randn(2, 1, side, side)))


@CASES("neuraloperator", precisions=("fp32",))  # complex weights know no bfloat16
def fourier_operator() -> Setup:
    from neuralop.losses import LpLoss
    from neuralop.models import FNO

    model = FNO(n_modes=(4, 4), in_channels=1, out_channels=1, hidden_channels=8, n_layers=2)
    return Setup(model, _fields(), on_output(LpLoss(d=2, p=2)))


@CASES("neuraloperator", precisions=("fp32",))
def tensorized_operator() -> Setup:
    from neuralop.models import TFNO

    model = TFNO(n_modes=(4, 4), in_channels=1, out_channels=1, hidden_channels=8, n_layers=2, rank=0.5)
    return Setup(model, _fields(), on_output(F.mse_loss))


@CASES("neuraloperator", precisions=("fp32",))
def u_shaped_operator() -> Setup:
    from neuralop.models import UNO

    layers = {"n_layers": 3, "uno_out_channels": [8, 8, 8], "uno_n_modes": [[4, 4]] * 3}
    scalings = {"uno_scalings": [[1.0, 1.0], [0.5, 0.5], [2.0, 2.0]], "channel_mlp_skip": "linear"}
    model = UNO(in_channels=1, out_channels=1, hidden_channels=8, **layers, **scalings)
    return Setup(model, _fields(), on_output(F.mse_loss))


class _Field(nn.Module):
    """A vector field that counts its evaluations, as torchdiffeq's examples do."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.nfe = nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 4)), 0

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.nfe += 1
        return self.net(y**3)


class _Ode(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.field, self.head, self.options = _Field(), nn.Linear(4, 2), options
        self.adjoint = options.pop("adjoint", False)

    def forward(self, y: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        from torchdiffeq import odeint, odeint_adjoint

        solve = odeint_adjoint if self.adjoint else odeint
        return self.head(solve(self.field, y, times, **self.options)[-1])


def _ode(**options: Any) -> Setup:
    times = torch.linspace(0.0, 1.0, 4)
    data = batches(lambda: call(torch.randn(8, 4), times, target=torch.randn(8, 2)))
    return Setup(_Ode(**options), data, on_output(F.mse_loss))


@CASES("torchdiffeq")
def runge_kutta_4() -> Setup:
    """The field counts its evaluations in an attribute."""
    return _ode(method="rk4")


@CASES("torchdiffeq")
def dormand_prince() -> Setup:
    """The number of steps depends on the data and the weights."""
    return _ode(method="dopri5", rtol=1e-3, atol=1e-4)


@CASES("torchdiffeq")
def adjoint() -> Setup:
    return _ode(method="rk4", adjoint=True)


@CASES("torchdiffeq")
def continuous_flow() -> Setup:
    """A continuous normalizing flow: the divergence takes autograd.grad in the forward."""
    from torchdiffeq import odeint

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 24), nn.Tanh(), nn.Linear(24, 2))

        def field(self, t: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            z = state[0]
            with torch.enable_grad():
                z = z.requires_grad_(True)
                dz = self.net(torch.cat([z, t.expand(len(z), 1)], 1))
                parts = [torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2)]
            return dz, -sum(parts, torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            times = torch.tensor([1.0, 0.0])
            z, change = odeint(self.field, (x, torch.zeros(len(x))), times, method="rk4")
            return -(torch.distributions.Normal(0.0, 1.0).log_prob(z[-1]).sum(1) - change[-1]).mean()

    return Setup(Flow(), batches(lambda: call(torch.randn(8, 2))))


@CASES("torchsde")
def latent_sde() -> Setup:
    """Brownian motion drawn in the forward, by a generator of its own."""
    import torchsde

    class Sde(nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def __init__(self) -> None:
            super().__init__()
            self.drift, self.scale = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)), nn.Linear(3, 3)

        def f(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.drift(y)

        def g(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(self.scale(y))

        def forward(self, y: torch.Tensor) -> torch.Tensor:
            times = torch.linspace(0.0, 1.0, 3)
            motion = torchsde.BrownianInterval(0.0, 1.0, size=y.shape, entropy=3)
            return torchsde.sdeint(self, y, times, bm=motion, dt=0.25, method="euler")[-1]

    data = batches(lambda: call(torch.randn(4, 3), target=torch.randn(4, 3)))
    return Setup(Sde(), data, on_output(F.mse_loss))


@CASES("torchcde")
def neural_cde() -> Setup:
    import torchcde

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6 * 3)

        def forward(self, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return self.linear(z).tanh().unflatten(-1, (6, 3))

    class Cde(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.field, self.head = nn.Linear(3, 6), Field(), nn.Linear(6, 1)

        def forward(self, coefficients: torch.Tensor) -> torch.Tensor:
            path = torchcde.LinearInterpolation(coefficients)
            start = self.start(path.evaluate(path.interval[0]))
            z = torchcde.cdeint(X=path, func=self.field, z0=start, t=path.interval, method="rk4", adjoint=False)
            return self.head(z[:, -1])

    def make() -> Batch:
        series = torch.cat([torch.linspace(0, 1, 6)[None, :, None].expand(4, 6, 1), torch.randn(4, 6, 2)], 2)
        return call(torchcde.linear_interpolation_coeffs(series), target=torch.rand(4, 1).round())

    return Setup(Cde(), batches(make), on_output(F.binary_cross_entropy_with_logits))


@CASES("gpytorch", precisions=("fp32",))  # factorizations know no bfloat16
def exact_gp() -> Setup:
    """Hyperparameters by the marginal likelihood; kernel and likelihood keep caches on themselves."""
    import gpytorch

    x, y = torch.linspace(0, 1, 20), torch.randn(20)

    class Gp(gpytorch.models.ExactGP):  # type: ignore[misc]
        def __init__(self, likelihood: Any) -> None:
            super().__init__(x, y, likelihood)
            self.mean, self.kernel = gpytorch.means.ConstantMean(), gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

        def forward(self, x: torch.Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))

    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    model = Gp(likelihood)

    def loss(module: Any, out: Any, target: Any) -> torch.Tensor:
        return -gpytorch.mlls.ExactMarginalLogLikelihood(module.likelihood, module)(out, y)

    return Setup(model, batches(lambda: call(x)), loss)


@CASES("gpytorch", precisions=("fp32",))
def deep_kernel_variational() -> Setup:
    """Features by a network, then a sparse variational GP; the model returns its negative ELBO."""
    import gpytorch

    class Layer(gpytorch.models.ApproximateGP):  # type: ignore[misc]
        def __init__(self) -> None:
            points = torch.randn(8, 2)
            guide = gpytorch.variational.CholeskyVariationalDistribution(8)
            super().__init__(gpytorch.variational.VariationalStrategy(self, points, guide))
            self.mean, self.kernel = gpytorch.means.ConstantMean(), gpytorch.kernels.RBFKernel()

        def forward(self, x: torch.Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))

    class DeepKernel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.gp = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 2)), Layer()
            self.likelihood = gpytorch.likelihoods.GaussianLikelihood()

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            bound = gpytorch.mlls.VariationalELBO(self.likelihood, self.gp, num_data=100)
            return -bound(self.gp(self.features(x)), y)

    return Setup(DeepKernel(), batches(lambda: call(torch.randn(20, 5), torch.randn(20))))


@CASES("pyro-ppl")
def variational_autoencoder() -> Setup:
    """An ELBO of a model and a guide, which register with pyro's global parameter store."""
    import pyro
    import pyro.distributions as dist
    from pyro.infer import Trace_ELBO

    class Vae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(10, 8), nn.Linear(4, 10)

        def model(self, x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 4), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

        def guide(self, x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                mean, scale = self.encoder(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(mean, scale.exp()).to_event(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bound: torch.Tensor = Trace_ELBO().differentiable_loss(self.model, self.guide, x)
            return bound

    return Setup(Vae(), batches(lambda: call(torch.randn(6, 10))))


@CASES("siren-pytorch")
def implicit_image() -> Setup:
    from siren_pytorch import SirenNet, SirenWrapper

    net = SirenNet(dim_in=2, dim_hidden=24, dim_out=3, num_layers=3, dropout=0.1)
    model = SirenWrapper(net, image_width=8, image_height=8)
    return Setup(model, batches(lambda: call(torch.rand(1, 3, 8, 8))))
