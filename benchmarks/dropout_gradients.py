"""Are gradients right under dropout? A derivative from outside, by central differences, against backward's.

    python -m benchmarks.dropout_gradients

A small model in float64 draws its dropout masks from the same seed before every forward, so that its loss is a smooth function
of the parameters; backward must give its derivative to about 1e-9. Compared: torch.compile with its activation memory budget
under three backends, and `planner.plan`. Prints a Markdown table.
"""

import platform
import warnings
from collections.abc import Callable, Iterator

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.nn import functional as F

from planner import PlannerError, plan

BACKENDS = ("aot_eager", "aot_eager_decomp_partition", "inductor")
COMPILE_BUDGETS = (1.0, 0.75, 0.5, 0.25, 0.0)
PLAN_BUDGETS = (1.0, 0.9, 0.8, 0.7)
STEP = 1e-6
X = torch.linspace(-1, 1, 4 * 6 * 8, dtype=torch.float64).reshape(4, 6, 8).sin()


class Block(nn.Module):
    """Attention with dropout on its weights, then a feed-forward layer with dropout."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.mix = nn.Linear(width, 3 * width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).chunk(3, -1)
        x = x + F.dropout((q @ k.transpose(-1, -2)).softmax(-1), 0.2) @ v
        return x + F.dropout(self.down(F.gelu(self.up(x))), 0.3)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(4))).double().train()


def loss(module: Callable[[Tensor], Tensor]) -> Tensor:
    torch.manual_seed(5)
    return module(X).square().sum()


def relative_error(module: Callable[[Tensor], Tensor], parameters: list[nn.Parameter]) -> float:
    """How far backward's derivative, along a random direction, is from the central difference of the same function."""
    loss(module).backward()
    torch.manual_seed(9)
    direction = [torch.randn_like(parameter) for parameter in parameters]
    backward = sum(float((p.grad * d).sum()) for p, d in zip(parameters, direction, strict=True) if p.grad is not None)
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(d, alpha=sign * STEP)
        sides.append(float(loss(module)))  # in grad mode, so that it is the very function that was differentiated
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.sub_(d, alpha=sign * STEP)
    difference = (sides[0] - sides[1]) / (2 * STEP)
    return abs(backward - difference) / abs(difference)


def cases() -> Iterator[tuple[str, float | str, Callable[[nn.Module], Callable[[Tensor], Tensor]]]]:
    yield "eager", "", lambda model: model
    for backend in BACKENDS:
        for budget in COMPILE_BUDGETS:

            def compiled(model: nn.Module, backend: str = backend, budget: float = budget) -> Callable[[Tensor], Tensor]:
                torch._dynamo.reset()
                torch._functorch.config.activation_memory_budget = budget
                return torch.compile(model, backend=backend)

            yield f"torch.compile, {backend}", budget, compiled
    for budget in PLAN_BUDGETS:
        yield "planner.plan", budget, lambda model, budget=budget: plan(model, budget, (X,), progress=False)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}, one thread\n")
    print("| method | budget | relative error of the derivative |\n| --- | --- | --- |")
    for name, budget, make in cases():
        model = build()
        try:
            error = f"{relative_error(make(model), list(model.parameters())):.0e}"
        except (PlannerError, RuntimeError) as failure:
            error = f"{type(failure).__name__}: {str(failure).splitlines()[0][:80]}"
        print(f"| {name} | {budget} | {error} |", flush=True)


if __name__ == "__main__":
    main()
