"""Sparse random signs: a matrix Q of few nonzero entries a row, whose products with rows cost next to nothing.

Each of the d rows of Q has at most 8 entries of +1 or -1, in random columns. To approximate a matrix from its products
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
        columns = torch.arange(self.rows.shape[0]).repeat_interleave(self.rows.shape[1])
        made = torch.zeros(self.dim, self.rows.shape[0], dtype=torch.float64)
        return made.index_put_((self.rows.flatten(), columns), self.signs.flatten().double(), accumulate=True)


@functools.lru_cache(maxsize=4)
def sparse_signs(dim: int, columns: int, seed: int) -> SparseSigns:
    """Q [dim, columns] on the CPU: the same on every call, so that sketches can be merged.

    Every column has equally many entries, and no row more than 8: rows are dealt out in random order, over and over.
    """
    generator = torch.Generator().manual_seed(seed)
    in_a_column = max(1, min(_ENTRIES, columns) * dim // columns)
    dealt = [torch.randperm(dim, generator=generator) for _ in range(-(-in_a_column * columns // dim))]
    rows = torch.cat(dealt)[: in_a_column * columns].view(columns, in_a_column)
    signs = 1.0 - 2.0 * torch.randint(0, 2, rows.shape, generator=generator)
    return SparseSigns(dim, rows, signs)
