"""flux_lab.instruments.stopwatch: the kinds of work, and their times add up."""

import pytest
import torch
import torch.nn.functional as F

from flux_lab.instruments.stopwatch import KINDS, REST, kind_of, time_by_kind


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("mkldnn::_linear_pointwise", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention product"),
        ("aten::native_layer_norm", "norms"),
        ("aten::gelu_", "GELU"),
        ("aten::addcmul_", "other arithmetic"),
        ("aten::copy_", "moving numbers"),
        ("aten::view", REST),
        ("aten::mm_something", REST),
    ],
)
def test_kinds(operation, kind):
    assert kind_of(operation) == kind


def test_times_add_up_and_stand_where_they_belong():
    left, right, small = torch.randn(400, 400), torch.randn(400, 400), torch.randn(4)

    def call():
        left @ right
        F.gelu(small)

    timing = time_by_kind(call, repeats=3)
    assert set(timing.kinds) == {*KINDS, REST}
    assert all(seconds >= 0 for seconds in timing.kinds.values())
    assert {kind for kind, seconds in timing.kinds.items() if seconds} - {REST} == {"matrix products", "GELU"}
    assert sum(timing.kinds.values()) >= 0.999 * timing.seconds
    assert timing.operations >= 3, "matmul, mm, gelu"
