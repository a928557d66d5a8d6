import pytest
import torch

from planner.kernels import custom
from planner.profiler.estimate import GENERIC_CPU, GENERIC_GPU, DeviceModel, estimate, estimate_node
from tests.support.nodes import aten, meta, mm, node

FLAT = DeviceModel("flat", flops_per_s=1e12, bytes_per_s=1e9, launch_ns=0)


def test_matrix_product_costs_its_flops():
    device = DeviceModel("fast memory", flops_per_s=1e12, bytes_per_s=1e15, launch_ns=7)
    assert estimate_node(mm(100), device).time_ns == 7 + 2 * 100**3 // 1000
    assert estimate_node(mm(1000), device).time_ns == 7 + 2 * 1000**3 // 1000


def test_elementwise_costs_its_bytes():
    x = torch.rand(1000, 1000)
    assert estimate_node(node(aten.add.Tensor, x, torch.rand(1000, 1000), out=meta(1000, 1000)), FLAT).time_ns == 12_000_000
    assert estimate_node(node(aten.add.Tensor, x, x, out=meta(1000, 1000)), FLAT).time_ns == 8_000_000
    row = torch.rand(1000).expand(1000, 1000)
    assert estimate_node(node(aten.add.Tensor, x, row, out=meta(1000, 1000)), FLAT).time_ns == 8_004_000


def test_lookup_reads_rows_not_the_table():
    lookup = node(aten.embedding.default, torch.rand(10**5, 10), torch.zeros(100, dtype=torch.int64), out=meta(100, 10))
    assert estimate_node(lookup, FLAT).time_ns == 4000 + 4000 + 800


def test_dtypes_have_their_own_speed():
    device = DeviceModel("tensor cores", 1e12, 1e15, 0, {torch.bfloat16: 4.0})
    assert estimate_node(mm(1000), device).time_ns == 4 * estimate_node(mm(1000, torch.bfloat16), device).time_ns


def test_fused_attention_on_cpu_is_counted():
    q, k, v = (torch.rand(2, 4, 64, 16) for _ in range(3))
    fused = aten._scaled_dot_product_flash_attention_for_cpu.default
    attention = node(fused, q, k, v, out=(meta(2, 4, 64, 16), meta(2, 4, 64)))
    device = DeviceModel("fast memory", 1e9, 1e15, 0)
    assert estimate_node(attention, device).time_ns == 2 * 2 * (2 * 4 * 64 * 64 * 16)


def test_plain_functions_have_a_price():
    assert estimate_node(node(torch.special.expit, torch.rand(1000), out=meta(1000)), FLAT).time_ns == 8000


def test_only_convolutions_get_a_workspace():
    x, w = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 3, 3)
    made = node(aten.convolution.default, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, out=meta(2, 4, 8, 8))
    assert estimate_node(made, FLAT).workspace_bytes == 4 * (x.numel() + w.numel())
    assert estimate_node(mm(10), FLAT).workspace_bytes == 0


def test_profile_is_deterministic_and_complete():
    nodes = [mm(10), node(aten.neg.default, torch.rand(5), out=meta(5))]
    profile = estimate(nodes)
    assert profile == estimate(nodes)
    assert set(profile.costs) == {"mm_default", "neg_default"}
    assert all(type(cost.time_ns) is int for cost in profile.costs.values())
    assert (profile.model, profile.device) == (GENERIC_CPU.name, GENERIC_CPU.name)
    assert estimate(nodes, GENERIC_GPU).model == GENERIC_GPU.name


def test_impossible_device_is_refused():
    with pytest.raises(ValueError, match="must be positive"):
        DeviceModel("broken", flops_per_s=0, bytes_per_s=1, launch_ns=0)


def test_random_draws_cost_more_than_the_bytes_they_write():
    device = DeviceModel("slow generator", 1e12, 1e15, 0, draws_per_s=1e6)
    drawn = torch.fx.Graph().call_function(custom.bernoulli, (0.5, (1000,), (1,), torch.float32, torch.device("cpu")))
    drawn.meta["val"] = meta(1000)
    assert estimate([drawn], device).costs[drawn.name].time_ns == 1_000_000
    copied = node(aten.clone.default, torch.rand(1000), out=meta(1000))
    assert estimate([copied], device).costs[copied.name].time_ns < 1_000
