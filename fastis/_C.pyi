from typing import Any

class Table:
    def __init__(self, tensors: dict[str, int], constants: dict[str, Any]) -> None: ...
    seed: int
    @property
    def address(self) -> int: ...

class DeviceTable:
    def __init__(self, tensors: dict[str, int], constants: dict[str, Any]) -> None: ...
    seed: int
    @property
    def address(self) -> int: ...

DEVICE_WORK: int

def isa() -> str: ...
def build_info() -> str: ...
def lanes() -> int: ...
def advise_huge_pages(address: int, num_bytes: int) -> None: ...
def structure_nodes(num_samples: int) -> int: ...
def device_structure_nodes(num_samples: int) -> int: ...
def rescale(table: int) -> None: ...
def emulate_update(
    table: int,
    indices: int,
    observed: int,
    weights: int,
    score: int,
    n: int,
    mean_grad: int,
    num_classes: int,
    stride: int,
) -> None: ...
def emulate_draw(table: int, indices: int, weights: int, stride: int) -> None: ...
def emulate_rescale(table: int, stride: int) -> None: ...
def emulate_update_and_draw(
    table: int,
    indices: int,
    observed: int,
    weights: int,
    score: int,
    n: int,
    mean_grad: int,
    num_classes: int,
    next_indices: int,
    next_weights: int,
    stride: int,
) -> None: ...

# The kernels for given weights, cuda_NAME(..., device, stream) and emulate_NAME(..., stride), are
# called by name: fastis/kernels/cuda/categorical.py. Their arguments: csrc/fastis.h.

cuda_targets: str

def cuda_missing(device: int) -> str: ...
def cuda_error_string(error: int) -> str: ...
def cuda_scale_grad(
    before: int,
    after: int,
    grad: int,
    out: int,
    scale: int,
    rows: int,
    columns: int,
    scale_stride: int,
    device: int,
    stream: int,
    /,
) -> int: ...
def cuda_update(
    table: int,
    indices: int,
    observed: int,
    weights: int,
    score: int,
    n: int,
    mean_grad: int,
    num_classes: int,
    device: int,
    stream: int,
    /,
) -> int: ...
def cuda_draw(table: int, indices: int, weights: int, device: int, stream: int, /) -> int: ...
def cuda_rescale(table: int, device: int, stream: int) -> int: ...
def cuda_load_sampler(device: int) -> int: ...
def cuda_update_and_draw(
    table: int,
    indices: int,
    observed: int,
    weights: int,
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
    observed: int,
    weights: int,
    score: int,
    n: int,
    mean_grad: int,
    num_classes: int,
) -> bool: ...
def copy_state(
    num_scalars: int,
    num_records: int,
    from_scalars: int,
    from_variance: int,
    from_records: int,
    to_scalars: int,
    to_variance: int,
    to_records: int,
) -> None: ...
def check_records(
    records: int, n: int, updates: int, exponent: int, importance: int, found: int
) -> int: ...
def draw(table: int, indices: int, weights: int, /) -> None: ...
def locate(table: int, points: int, count: int, indices: int, weights: int) -> None: ...
def weigh(
    format: int, weights: int, n: int, threads: int, ends: int, shift_and_total: int, /
) -> bool: ...
def integers(format: int, weights: int, n: int, shift: int, threads: int, out: int) -> None: ...
def search(
    format: int,
    weights: int,
    n: int,
    shift: int,
    ends: int,
    total: int,
    seed: int,
    first: int,
    count: int,
    indices: int,
    coefficients: int,
    /,
) -> None: ...
def alias_build(
    format: int, weights: int, n: int, shift: int, total: int, threads: int, table: int
) -> None: ...
def alias_draw(
    table: int,
    n: int,
    total: int,
    seed: int,
    first: int,
    count: int,
    indices: int,
    coefficients: int,
    /,
) -> None: ...
def alias_resolve(
    table: int, n: int, total: int, points: int, count: int, indices: int, coefficients: int
) -> None: ...
def draw_points(total: int, seed: int, first: int, count: int, points: int) -> None: ...
def cross_entropy(
    format: int,
    logits: int,
    row_stride: int,
    target: int,
    soft: int,
    weights: int,
    class_weights: int,
    B: int,
    T: int,
    C: int,
    ignore_index: int,
    smoothing: float,
    denominator: float,
    reduce: bool,
    grad: int,
    loss: int,
    losses: int,
    score: int,
    mean_grad: int,
    threads: int,
    /,
) -> int: ...
def label_loss(
    kind: int,
    format: int,
    logits: int,
    target: int,
    weights: int,
    pos_weight: int,
    B: int,
    L: int,
    divisor: float,
    denominator: float,
    reduce: bool,
    grad: int,
    loss: int,
    losses: int,
    score: int,
    mean_grad: int,
    threads: int,
    /,
) -> None: ...
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
