"""How far two masks cover each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@overload
def iou(first: Tensor, second: Tensor) -> Tensor: ...
@overload
def iou(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> NDArray[np.float64]: ...
def iou(first: Any, second: Any) -> Any:
    """Intersection over union of masks, in [0, 1]; 1 where both are empty.

    Args:
        first: (..., H, W) bool, of numpy or torch.
        second: the same.

    Returns:
        (...) float64, or float32 of torch.
    """
    union = (first | second).sum((-2, -1))
    is_empty = union == 0
    return ((first & second).sum((-2, -1)) + is_empty) / (union + is_empty)
