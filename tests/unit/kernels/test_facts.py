"""What is known of operators, by operator and not by parts of their names."""

import pytest
import torch

from planner.kernels.facts import may_hold_much

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        (aten.convolution.default, True),
        (aten.convolution_backward.default, True),
        (aten.mkldnn_rnn_layer.default, True),
        (aten._convert_indices_from_coo_to_csr.default, False),
        (aten.mm.default, False),
        (len, False),
    ],
    ids=str,
)
def test_kernels_that_may_hold_much_for_themselves(operator, expected):
    assert may_hold_much(operator) == expected


def test_of_operators_of_other_libraries_nothing_is_known():
    @torch.library.custom_op("facts_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    assert may_hold_much(torch.ops.facts_test.twice.default)
