"""The binder of the compiled extension: what does not fit a parameter is an error, not a number."""

import math

import pytest
import torch

_C = pytest.importorskip("fastis._C")

LOGITS, TARGET, OUT = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), torch.zeros(3)
LOSS, LOSSES, SCORE = (part.data_ptr() for part in OUT)
FIELDS = {
    "format": 0, "logits": LOGITS.data_ptr(), "row_stride": 2, "target": TARGET.data_ptr(),
    "soft": 0, "weights": 0, "class_weights": 0, "B": 1, "T": 1, "C": 2, "ignore_index": -100,
    "smoothing": 0.0, "denominator": 1.0, "reduce": True, "grad": 0, "loss": LOSS,
    "losses": LOSSES, "score": SCORE, "mean_grad": 0, "threads": 1,
}  # fmt: skip


def call(**changed):
    return _C.cross_entropy(*{**FIELDS, **changed}.values())


def test_fields_are_taken_in_their_order():
    assert call(denominator=4.0) == -1
    assert OUT.tolist() == pytest.approx([math.log(2) / 4, math.log(2), math.sqrt(0.5)])
    assert call(ignore_index=0) == -1
    assert OUT.tolist() == [0, 0, 0]
    assert call(C=0) == 0  # the row of the first bad label


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"reduce": 1}, TypeError, "expected a bool, got 1"),
        ({"reduce": None}, TypeError, "expected a bool, got None"),
        ({"format": 2**40}, OverflowError, "does not fit"),
        ({"threads": -(2**40)}, OverflowError, "does not fit"),
        ({"B": 2**64}, OverflowError, "too big"),
        ({"logits": -1}, OverflowError, "negative"),
        ({"C": 2.0}, TypeError, "float"),
        ({"smoothing": "a"}, TypeError, "must be real number"),
        ({"C": 2**55}, MemoryError, None),
    ],
)
def test_what_does_not_fit(changed, error, message):
    before = OUT.clone()
    with pytest.raises(error, match=message):
        call(**changed)
    assert torch.equal(OUT, before)


def test_wrong_count():
    with pytest.raises(TypeError, match="cross_entropy takes 20 positional arguments, got 1"):
        _C.cross_entropy(0)
    with pytest.raises(TypeError, match="isa takes 0 positional arguments, got 1"):
        _C.isa(1)
