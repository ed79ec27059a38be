"""Where the milliseconds of a call go: how long PyTorch's operations take, sorted by what they are for."""

import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile

# What an operation is for -> its names in PyTorch. What fits none is bookkeeping: views, sizes, the choice of a kernel, and Python.
KINDS = {
    "matrix products": r"aten::(addmm|mm|bmm|baddbmm|convolution.*|mkldnn_convolution)$|mkldnn::_linear_pointwise$",
    "attention product": r"aten::_scaled_dot_product",
    "norms": r"aten::(native_layer_norm|_fused_rms_norm|native_group_norm|linalg_vector_norm|hypot|pow_?|rsqrt_?|mean|sum|square_?)$",
    "GELU": r"aten::gelu_?$",
    "other arithmetic": r"aten::(mul|add|sub|div|neg|silu|sigmoid|addcmul|cos|sin)_?$",
    "moving numbers": r"aten::(copy_|cat|clone|contiguous|stack)$",
}
REST = "Python and bookkeeping"


class Timing(NamedTuple):
    """`seconds` of one call; of these, `kinds` of work; and how many `operations` PyTorch was asked for."""

    seconds: float
    kinds: dict[str, float]
    operations: int


def kind_of(operation: str) -> str:
    """What an operation is for, by its name in PyTorch's profile."""
    return next((kind for kind, pattern in KINDS.items() if re.match(pattern, operation)), REST)


def time_by_kind(call: Callable[[], Any], repeats: int = 7) -> Timing:
    """Seconds of one call, on the CPU, by kind of work. The shortest of `repeats` calls is split as the profiler sees one more.

    The profiler takes about a microsecond for each operation, and what it sees of each kind is that much too long; what is left of the
    whole, bookkeeping, is that much too short.
    """
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    whole, kinds = min(seconds), Counter(dict.fromkeys(KINDS, 0.0))
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    operations = [event for event in seen.key_averages() if event.key.startswith(("aten::", "mkldnn::"))]
    for operation in operations:
        kinds[kind_of(operation.key)] += operation.self_cpu_time_total / 1e6
    kinds[REST] = max(whole - sum(kinds[kind] for kind in KINDS), 0.0)
    return Timing(whole, dict(kinds), sum(operation.count for operation in operations))
