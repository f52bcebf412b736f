"""How matrix products are shaped so that a row's result does not depend on the other rows, bit for bit.

Measured on a CPU (MKL, AVX2; `tests/engines/test_embedded_invariance.py` repeats it on the machine at hand): a row of a
float32 product is the same whatever the number of rows, as long as each thread gets at least four. Below that the
library takes another kernel, which adds in another order.
"""

from __future__ import annotations

import torch

MIN_ROWS = 4
"""Rows that one thread's share of a product must have."""


def row_multiple() -> int:
    """Row counts that are multiples of this give every thread enough rows."""
    return MIN_ROWS * torch.get_num_threads()
