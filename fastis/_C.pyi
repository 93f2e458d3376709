from typing import Any

class Table:
    def __init__(self, tensors: dict[str, int], constants: dict[str, Any]) -> None: ...
    seed: int
    least_gain: float
    @property
    def address(self) -> int: ...

class DeviceTable:
    def __init__(self, tensors: dict[str, int], constants: dict[str, Any]) -> None: ...
    seed: int
    least_gain: float
    @property
    def address(self) -> int: ...

DEVICE_WORK: int

def isa() -> str: ...
def build_info() -> str: ...
def advise_huge_pages(address: int, num_bytes: int) -> None: ...
def tree_nodes(num_samples: int) -> int: ...
def device_tree_nodes(num_samples: int) -> int: ...
def rescale(table: int) -> None: ...

# The categorical kernels, cuda_NAME(..., device, stream), are called by name:
# fastis/kernels/cuda/categorical.py. Their arguments: csrc/fastis.h.

cuda_targets: str

def cuda_missing(device: int) -> str: ...
def cuda_error_string(error: int) -> str: ...
def cuda_scale_grad(*call_device_stream: int) -> int: ...
def cuda_update(
    table: int,
    indices: int,
    weights: int,
    observed: int,
    score: int,
    n: int,
    mean_grad: int,
    num_classes: int,
    device: int,
    stream: int,
    /,
) -> int: ...
def cuda_draw(table: int, indices: int, weights: int, device: int, stream: int, /) -> int: ...
def cuda_clear(table: int, indices: int, n: int, last: int, device: int, stream: int, /) -> int: ...
def cuda_rescale(table: int, device: int, stream: int) -> int: ...
def cuda_load_sampler(device: int) -> int: ...
def cuda_update_and_draw(
    table: int,
    indices: int,
    weights: int,
    observed: int,
    score: int,
    n: int,
    mean_grad: int,
    num_classes: int,
    next_indices: int,
    next_weights: int,
    device: int,
    stream: int,
    /,
) -> int: ...
def update(
    table: int,
    indices: int,
    weights: int,
    observed: int,
    score: int,
    n: int,
    mean_grad: int,
    num_classes: int,
    /,
) -> None: ...
def fold(
    table: int,
    indices: int,
    weights: int,
    observed: int,
    score: int,
    n: int,
    mean_grad: int,
    num_classes: int,
    iteration: int,
    /,
) -> None: ...
def copy_state(
    num_scalars: int,
    num_states: int,
    from_scalars: int,
    from_variance: int,
    from_states: int,
    to_scalars: int,
    to_variance: int,
    to_states: int,
) -> None: ...
def clear(table: int, indices: int, n: int, last: int, /) -> None: ...
def check_states(
    states: int, n: int, updates: int, exponent: int, importance: int, found: int
) -> int: ...
def draw(table: int, indices: int, weights: int, /) -> None: ...
def shard_total(table: int, theta: int, found: int, /) -> None: ...
def draw_share(table: int, /, *share_and_addresses: float) -> int: ...
def quantize(
    format: int,
    values: int,
    n: int,
    shift: int,
    total: int,
    prefix: int,
    threads: int,
    shift_and_total: int,
    /,
) -> bool: ...
def integer_weights(
    format: int,
    values: int,
    n: int,
    shift: int,
    total: int,
    prefix: int,
    threads: int,
    out: int,
    /,
) -> None: ...
def categorical_draw(
    format: int,
    values: int,
    n: int,
    shift: int,
    total: int,
    prefix: int,
    seed: int,
    first: int,
    count: int,
    indices: int,
    weights: int,
    /,
) -> None: ...
def alias_build(
    format: int,
    values: int,
    n: int,
    shift: int,
    total: int,
    prefix: int,
    threads: int,
    table: int,
    /,
) -> None: ...
def alias_draw(
    buckets: int,
    n: int,
    total: int,
    seed: int,
    first: int,
    count: int,
    indices: int,
    weights: int,
    /,
) -> None: ...
def alias_inverse_cdf(
    buckets: int,
    n: int,
    total: int,
    points: int,
    count: int,
    indices: int,
    weights: int,
    /,
) -> None: ...
def random_below(total: int, seed: int, first: int, count: int, out: int, /) -> None: ...

# The fields of CrossEntropy, ElementwiseLoss and ScaleGrad in their order: csrc/fastis.h.
def cross_entropy(*call: float) -> int: ...
def elementwise_loss(*call: float) -> None: ...
def is_one(x: int, /) -> bool: ...
def batch_norm_forward(
    format: int,
    batch: int,
    channels: int,
    spatial: int,
    channels_last: bool,
    x: int,
    share: int,
    weight: int,
    bias: int,
    eps: float,
    running_mean: int,
    running_var: int,
    correction: int,
    momentum: float,
    mean: int,
    var: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def batch_norm_backward(
    format: int,
    batch: int,
    channels: int,
    spatial: int,
    channels_last: bool,
    dy: int,
    x: int,
    share: int,
    weight: int,
    mean: int,
    var: int,
    eps: float,
    dx: int,
    grad_weight: int,
    grad_bias: int,
    threads: int,
    /,
) -> None: ...
