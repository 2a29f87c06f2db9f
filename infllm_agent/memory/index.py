"""The index of one layer: one key for every block, and which of them a lookup has to read. The one thing that grows.

Up to ``flat`` blocks, a lookup compares the keys of all. Of more it first asks in which *cells* their keys lie: in each
key head, a grid along the principal axes of the keys, finer along longer ones (transform coding; Brandt, CVPR 2010). A
cell's centre tells what the queries make of the keys in it, so that one table for each key head gives every block a
score, however many queries ask (inverted lists; Jégou et al., Product quantization, TPAMI 2011). Only the best
√(flat · blocks / 2) are then compared by their keys. In the softmax, cells stand for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from infllm_agent.kernels import backend
from infllm_agent.kernels.votes.plain import SLAB, cell_shares, cell_sizes, votes, votes_among
from infllm_agent.platform.threads import begun

#: Blocks there is room for at first; the room doubles when it is full.
INDEX_STEP = 2048
#: Cells in each key head.
CELLS = 4096
#: Most parts of an axis.
PARTS = 16
#: To decide on a cell, keys and axes are rounded to so many steps on either side of 0. Sums of products of integers are
#: exact in float32 (in heads of up to 1,000), so a key's cell does not depend on what it is computed together with.
STEPS = 127

NORMAL = NormalDist()


class Rows:
    """An array on the device that grows at its end. Forks share what they have in common."""

    def __init__(self, row: tuple[int, ...], dtype: torch.dtype, device: torch.device, room: int = INDEX_STEP) -> None:
        self._room = torch.empty((room, *row), dtype=dtype, device=device)
        self._shared = False
        self.count = 0

    @property
    def room(self) -> int:
        return self._room.shape[0]

    @property
    def all(self) -> Tensor:
        """The rows: (count, *row)."""
        return self._room[: self.count]

    def room_for(self, count: int) -> int:
        """For how many rows there is room once there are ``count``."""
        return self.room if count <= self.room else max(2 * self.room, -(-count // INDEX_STEP) * INDEX_STEP)

    def growth(self, count: int) -> int:
        """Bytes more that it will take when so many rows are appended."""
        return (self.room_for(self.count + count) - self.room) * self._room[0].nbytes

    def append(self, rows: Tensor) -> None:
        if rows.shape[0]:
            self.extend(rows.shape[0]).copy_(rows)

    def extend(self, count: int) -> Tensor:
        """So many rows more, to be written by the caller."""
        stop = self.count + count
        room = self.room_for(stop)
        if room > self.room or self._shared:
            grown = self._room.new_empty((room, *self._room.shape[1:]))
            grown[: self.count] = self.all
            self._room, self._shared = grown, False
        self.count = stop
        return self._room[stop - count : stop]

    def fork(self, count: int) -> Rows:
        """The first ``count`` rows, independent: nothing is copied until they grow."""
        fork = object.__new__(Rows)
        # Rows below `self.count` never change, so both may read them; only the original goes on writing behind them.
        fork._room, fork._shared, fork.count = self._room, True, count
        return fork

    def device_bytes(self) -> int:
        return self._room.nbytes


@dataclass(frozen=True)
class Grid:
    """Which cell a key lies in: between which bounds along each of some axes. Fitted once, to the first keys.

    Attributes:
        mean: (kv_heads, head_dim), of those keys.
        axes: (kv_heads, axes, head_dim), their longest principal axes.
        deviations: (kv_heads, axes), of the keys along them.
        parts: into how many parts each axis is divided, as probable as each other if keys are normal.
        step: (kv_heads, head_dim), to whose multiples a key's distance from the mean is rounded.
        directions: (kv_heads, bounds, head_dim), integers: the axis of each bound, for keys in such steps.
        bounds: (kv_heads, bounds, 1), integers: where they are along their directions.
    """

    mean: Tensor
    axes: Tensor
    deviations: Tensor
    parts: tuple[int, ...]
    step: Tensor
    directions: Tensor
    bounds: Tensor

    @classmethod
    def fit(cls, keys: Tensor) -> Grid:
        """A grid for keys (blocks, kv_heads, head_dim)."""
        by_head = keys.float().transpose(0, 1)
        mean = by_head.mean(dim=1)
        offsets = by_head - mean.unsqueeze(1)
        variances, vectors = torch.linalg.eigh(offsets.mT @ offsets / offsets.shape[1])
        deviations, axes = variances.clamp_min(0).sqrt().flip(1), vectors.mT.flip(1)
        parts = _divided(deviations.mean(dim=0).tolist())
        deviations, axes = deviations[:, : len(parts)], axes[:, : len(parts)]

        step = (offsets.abs().amax(dim=1) / STEPS).clamp_min(1e-20)  # keys may be all the same
        bound_axes = [axis for axis, n in enumerate(parts) for _ in range(n - 1)]
        quantiles = [NORMAL.inv_cdf(i / n) for n in parts for i in range(1, n)]
        directions = axes[:, bound_axes] * step.unsqueeze(1)
        scale = STEPS / directions.abs().amax(dim=2, keepdim=True)
        bounds = (deviations[:, bound_axes] * torch.tensor(quantiles, device=keys.device)).unsqueeze(-1)
        return cls(mean, axes, deviations, parts, step, (directions * scale).round(), (bounds * scale).round())

    @property
    def cells(self) -> int:
        """How many there are in each key head."""
        return math.prod(self.parts)

    def middles(self) -> Tensor:
        """The mean (kv_heads, cells, head_dim) of the keys in each cell, seen from that of all, if keys are normal."""
        numbers, along = torch.arange(self.cells), []
        for axis, n in enumerate(self.parts):
            edges = [0.0, *(NORMAL.pdf(NORMAL.inv_cdf(i / n)) for i in range(1, n)), 0.0]
            means = torch.tensor([n * (low - high) for low, high in pairwise(edges)])
            along.append(means[numbers // math.prod(self.parts[:axis]) % n])
        return (torch.stack(along, dim=1).to(self.mean.device) * self.deviations.unsqueeze(1)) @ self.axes

    def sort(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The cells (n, kv_heads) int16 in which keys (n, kv_heads, head_dim) lie; how far they are from the mean, in
        whole steps: (n, kv_heads, head_dim) bfloat16, which is exact."""
        cells = torch.empty(keys.shape[:2], dtype=torch.int16, device=keys.device)
        steps = torch.empty(keys.shape, dtype=torch.bfloat16, device=keys.device)
        weights = [float(math.prod(self.parts[:axis])) for axis, n in enumerate(self.parts) for _ in range(n - 1)]
        digits = torch.tensor(weights, device=keys.device)
        slabs = (torch.split(each, SLAB) for each in (keys, cells, steps))
        for part, part_cells, part_steps in zip(*slabs, strict=True):
            rounded = (part.float() - self.mean).div_(self.step).round_().clamp_(-STEPS, STEPS)
            beyond = (self.directions @ rounded.permute(1, 2, 0)).sub_(self.bounds).clamp_(0, 1)  # integers: 0 or 1
            part_cells.copy_((digits @ beyond).T)
            part_steps.copy_(rounded)
        return cells, steps


def _divided(deviations: list[float]) -> tuple[int, ...]:
    """Into how many parts each of the longest axes is divided: always one with the widest parts, until there are
    ``CELLS`` cells or ``PARTS`` parts everywhere."""
    parts = [1] * len(deviations)
    while math.prod(parts) < CELLS and min(parts) < PARTS:
        coarse = [axis for axis, n in enumerate(parts) if n < PARTS]
        parts[max(coarse, key=lambda axis: (deviations[axis] / parts[axis], -parts[axis]))] *= 2
    return tuple(n for n in parts if n > 1)


class Cells:
    """In which cells the keys of more than ``flat`` blocks lie, and what keys are like there.

    Args:
        keys: (blocks, kv_heads, head_dim), of all blocks so far.
        room: for so many blocks there is room in the index.
    """

    def __init__(self, keys: Tensor, flat: int, room: int) -> None:
        self.flat = flat
        self._grid = Grid.fit(keys[:flat])
        self._of_blocks = Rows((keys.shape[1],), torch.int16, keys.device, room)
        self._known = 0  # blocks that the centres were taken of
        self._centres = keys.new_empty(0)
        self._sizes = keys.new_empty(0)  # how many blocks lie in each cell
        self.extend(keys)

    def extend(self, keys: Tensor) -> None:
        """Now ``keys`` are those of all blocks. Centres are taken anew whenever there are an eighth more."""
        known = self.flat
        while (more := known + -(-known // 8)) < len(keys):
            known = more
        if self._known != known:
            self._known = known
            self._take_centres(keys[:known])
        cells, _ = self._grid.sort(keys[self._of_blocks.count :])
        self._of_blocks.append(cells)
        self._sizes = cell_sizes(self._of_blocks.all.T.long(), self._grid.cells)

    def _take_centres(self, keys: Tensor) -> None:
        """A centre is the mean of a cell's keys and of one more, in the middle of the cell."""
        grid, (kv_heads, head_dim) = self._grid, keys.shape[1:]
        cells, steps = grid.sort(keys)
        self._of_blocks.append(cells[self._of_blocks.count :])
        by_head = cells.T.long()
        sizes = cell_sizes(by_head, grid.cells)
        ends = sizes.flatten().cumsum(0)
        in_order = (by_head.T + grid.cells * torch.arange(kv_heads, device=keys.device)).flatten().sort(stable=True)
        # Sums of integers again, and so the same in any order.
        sums = embedding_bag(in_order.indices, steps.view(-1, head_dim), ends - sizes.flatten(), mode="sum")
        offsets = sums.float().view(kv_heads, -1, head_dim).mul_(grid.step.unsqueeze(1)).add_(grid.middles())
        self._centres = offsets.div_((sizes + 1).unsqueeze(-1)).add_(grid.mean.unsqueeze(1)).to(keys.dtype)

    def fork(self, keys: Tensor) -> Cells:
        """The same for the first of all keys, independent of these."""
        fork = copy(self)
        fork._of_blocks = self._of_blocks.fork(len(keys))
        fork.extend(keys)
        return fork

    def near(self, q: Tensor, scale: float, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` blocks with the most votes of queries (q_heads, n, head_dim) float32, by their cells alone.

        Returns:
            These blocks, ascending; log Σ exp(scale · q·k) over all others, (kv_heads, queries of a key head, 1).
        """
        cells = self._of_blocks.all.T.long()
        shares, total = cell_shares(q, self._centres, self._sizes, scale)
        a_block = shares.sum(dim=1) / self._sizes.clamp_min(1)
        near = backend.best(a_block.gather(1, cells).sum(dim=0), count)
        far = 1 - cell_sizes(cells[:, near], self._grid.cells) / self._sizes.clamp_min(1)
        return near, total + (shares @ far.unsqueeze(-1)).log()

    def growth(self, count: int) -> int:
        """Bytes more that it will take when there are so many blocks more."""
        return self._of_blocks.growth(count)

    @staticmethod
    def size(keys: Tensor, room: int) -> int:
        """Bytes that the cells of such keys take, with room for so many."""
        kv_heads, head_dim = keys.shape[1:]
        return room * kv_heads * torch.int16.itemsize + CELLS * kv_heads * head_dim * keys.itemsize

    def device_bytes(self) -> int:
        """Bytes that each block takes, and those of the centres; the rest is small beside them."""
        return self._of_blocks.device_bytes() + self._centres.nbytes


class BlockIndex:
    """A key (kv_heads, head_dim) for each block, as precise as the model's own, in one array on the device.

    All there is follows, to the bit, from the sequence of keys: not from how many were appended at once, nor from what
    was appended to the index that this one is a fork of.

    Args:
        flat: most blocks of which a lookup compares all keys; None: of any number.
    """

    def __init__(
        self, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, flat: int | None = None
    ) -> None:
        self.flat = flat
        self._keys = Rows((kv_heads, head_dim), dtype, device)
        self._sorted: Cells | None = None
        self._finish: Callable[[], None] | None = None

    @property
    def count(self) -> int:
        return self._keys.count

    @property
    def keys(self) -> Tensor:
        """The keys of all blocks: (count, kv_heads, head_dim)."""
        return self._keys.all

    def append(self, keys: Tensor) -> None:
        """Add the keys (n, kv_heads, head_dim) of the next n blocks."""
        self._keys.append(keys)
        self.sort()

    @property
    def _cells(self) -> Cells | None:
        """Of all keys; None of so few that no cells are needed."""
        if self._finish is not None:
            finish, self._finish = self._finish, None
            finish()
        return self._sorted

    def extend(self, count: int) -> Tensor:
        """Room (count, kv_heads, head_dim) for the keys of so many blocks more; once they are there, ``sort``."""
        return self._keys.extend(count)

    def sort(self) -> None:
        """Put keys that are new into cells."""
        if self._cells is not None:
            self._cells.extend(self.keys)
        elif self.flat is not None and self.count > self.flat:
            self._sort_all()

    def sort_soon(self) -> None:
        """The same in another thread; who needs the cells first waits for them."""
        if self.flat is not None and self.count > self.flat:
            self._finish = begun(self._sort_all)

    def _sort_all(self) -> None:
        assert self.flat is not None
        self._sorted = Cells(self.keys, self.flat, self._keys.room)

    def growth(self, count: int) -> int:
        """Bytes more that it will take when so many blocks are appended."""
        more = self._keys.growth(count)
        if self._sorted is not None:
            return more + self._sorted.growth(count)
        if self._finish is not None:
            return more + Cells.size(self.keys, self._keys.room_for(self.count + count)) - self._size_of_cells()
        if self.flat is not None and self.count + count > self.flat:
            more += Cells.size(self.keys, self._keys.room_for(self.count + count))
        return more

    def fork(self, count: int) -> BlockIndex:
        """An independent index of the first ``count`` blocks: no key is copied until it grows."""
        cells = self._cells
        fork = copy(self)
        fork._keys = self._keys.fork(count)
        if cells is not None:
            fork._sorted = cells.fork(fork.keys) if count > cells.flat else None
        return fork

    def most_voted(self, q: Tensor, scale: float, count: int) -> Tensor:
        """The ``count`` blocks with the most votes of queries (q_heads, n, head_dim) float32; ascending."""
        cells = self._cells
        if cells is None:
            return backend.best(votes(q, self.keys, scale), count)
        compared = max(count, math.isqrt(cells.flat * self.count // 2))
        near, others = cells.near(q, scale, compared)
        keys = self.keys.flatten(1).index_select(0, near).view(-1, *self.keys.shape[1:])  # far faster than [near]
        return near[backend.best(votes_among(q, keys, others, scale), count)]

    def device_bytes(self) -> int:
        return self._keys.device_bytes() + self._size_of_cells()

    def _size_of_cells(self) -> int:
        if self._sorted is not None:
            return self._sorted.device_bytes()
        return 0 if self._finish is None else Cells.size(self.keys, self._keys.room)
