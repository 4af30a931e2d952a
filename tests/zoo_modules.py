"""The zoo's models of plain torch: what has no library of its own, and the kinds of layers that no other model has."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 512


class UNet(nn.Module):
    """Two levels down, transposed convolutions up, and a skip connection at each level."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()

        def block(before: int, after: int) -> nn.Module:
            return nn.Sequential(
                *(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()),
                *(nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(4, after), nn.ReLU()),
            )

        self.down = nn.ModuleList([block(3, width), block(width, 2 * width)])
        self.middle = block(2 * width, 4 * width)
        self.widen = nn.ModuleList(
            [nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2), nn.ConvTranspose2d(2 * width, width, 2, stride=2)]
        )
        self.up = nn.ModuleList([block(4 * width, 2 * width), block(2 * width, width)])
        self.head = nn.Conv2d(width, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for widen, block, skip in zip(self.widen, self.up, reversed(skips), strict=True):
            x = block(torch.cat((widen(x), skip), 1))
        return self.head(x)  # type: ignore[no-any-return]


class LSTMClassifier(nn.Module):
    """An embedding, a bidirectional LSTM, and two linear layers over its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 64)
        self.lstm = nn.LSTM(64, 64, num_layers=2, batch_first=True, bidirectional=True)
        self.hidden = nn.Linear(128, 128)
        self.head = nn.Linear(128, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(input_ids))
        return self.head(torch.relu(self.hidden(states[:, -1])))  # type: ignore[no-any-return]


class Translator(nn.Module):
    """``nn.Transformer`` between embeddings and a head, with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 64)
        self.transformer = nn.Transformer(64, 4, 2, 2, 128, batch_first=True)
        self.head = nn.Linear(64, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=self.head.weight.dtype)
        states = self.transformer(self.embedding(source), self.embedding(target), tgt_mask=mask, tgt_is_causal=True)
        return self.head(states)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` over feature rows, in the mode in which torch has a fast path for it."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))  # type: ignore[no-any-return]


class TemporalNet(nn.Module):
    """Dilated 1-D convolutions under weight norm, as in audio models, with residual connections."""

    def __init__(self) -> None:
        super().__init__()
        weight_norm = nn.utils.parametrizations.weight_norm
        self.first = nn.Conv1d(64, 64, 1)
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv1d(64, 64, 3, padding=dilation, dilation=dilation)) for dilation in (1, 2, 4)
        )
        self.head = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return self.head(x.mean(-1))  # type: ignore[no-any-return]


class VideoNet(nn.Module):
    """3-D convolutions with batch norms, one of them factored in space and time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 32, 3, padding=1, bias=False), nn.BatchNorm3d(32), nn.ReLU())
        self.space = nn.Sequential(nn.Conv3d(32, 64, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(64), nn.ReLU())
        self.time = nn.Sequential(nn.Conv3d(64, 64, (3, 1, 1), padding=(1, 0, 0)), nn.ReLU())
        self.grouped = nn.Sequential(nn.Conv3d(64, 64, 3, padding=1, stride=2, groups=4), nn.ReLU())
        self.head = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.time(self.space(self.stem(x))))
        return self.head(x.mean((2, 3, 4)))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """Experts whose weights are one tensor, applied by bmm and einsum, mixed by a soft gate."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(32, 64)
        self.gate = nn.Linear(64, experts)
        self.up = nn.Parameter(torch.randn(experts, 64, 128) / 8)
        self.down = nn.Parameter(torch.randn(experts, 128, 64) / 12)
        self.mix = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        rows = x.flatten(0, 1)
        hidden = F.gelu(torch.einsum("nd,edh->neh", rows, self.up))
        each = torch.bmm(hidden.transpose(0, 1), self.down).transpose(0, 1)
        mixed = (each * self.gate(rows).softmax(-1).unsqueeze(-1)).sum(1)
        return torch.einsum("nd,do->no", mixed, self.mix).view_as(x) + x


class Router(nn.Module):
    """Control flow that depends on values, which no graph holds: an early exit, and a loop as long as an input says."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.step = nn.Linear(64, 64)
        self.often = nn.Linear(64, 64)
        self.never = nn.Linear(64, 64)
        self.head = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        for _ in range(int(x.abs().sum() > 0) + 1):
            x = x + torch.tanh(self.step(x))
        x = self.often(x) if float(x.mean()) > -1e3 else self.never(x)
        return self.head(x)  # type: ignore[no-any-return]
