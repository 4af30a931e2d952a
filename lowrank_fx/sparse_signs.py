"""Sparse random signs: a matrix Q of few nonzero entries a row, whose products with rows cost next to nothing.

Each of the d rows of Q has about 8 entries of +1 or -1, in random columns. To approximate a matrix from its products
with Q such entries do as well as dense ones in practice; source: Tropp, Yurtsever, Udell, Cevher 2019, "Streaming
low-rank matrix approximation with an application to scientific simulation", SIAM J. Sci. Comput. 41(4), section 3.3.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_ENTRIES = 8
"""Nonzero entries in a row of Q, or one fewer; the source's choice."""


class SparseSigns(NamedTuple):
    """Q [d, c], column by column.

    Attributes:
        dim: d.
        rows: in which rows a column's entries are [c, m], int64.
        signs: the entries [c, m], float32.
    """

    dim: int
    rows: Tensor
    signs: Tensor

    def times(self, matrix: Tensor) -> Tensor:
        """``matrix`` [n, d], float32, times Q: [n, c]."""
        rows, signs = (part.to(matrix.device) for part in (self.rows, self.signs))
        return F.embedding_bag(rows, matrix.T.contiguous(), mode="sum", per_sample_weights=signs).T

    def dense(self) -> Tensor:
        """Q itself [d, c], float64."""
        made = torch.zeros(self.rows.shape[0], self.dim, dtype=torch.float64, device="cpu")
        return made.scatter_add_(1, self.rows, self.signs.double()).T


@functools.lru_cache(maxsize=4)
def sparse_signs(dim: int, columns: int, seed: int) -> SparseSigns:
    """Q [dim, columns] on the CPU: the same on every call, so that sketches can be merged.

    Every column has equally many entries, and so has every row up to one: rows are dealt out in random order, over and
    over. Of few rows each column has at least one.
    """
    generator = torch.Generator().manual_seed(seed)
    in_a_column = max(1, min(_ENTRIES, columns) * dim // columns)
    rounds = -(-in_a_column * columns // dim)
    dealt = [torch.randperm(dim, generator=generator, device="cpu") for _ in range(rounds)]
    rows = torch.cat(dealt)[: in_a_column * columns].view(columns, in_a_column)
    heads = torch.randint(0, 2, rows.shape, generator=generator, device="cpu")
    return SparseSigns(dim, rows, 1 - 2 * heads.to(torch.float32))
