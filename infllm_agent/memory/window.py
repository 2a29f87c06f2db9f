"""The local window: the latest tokens of a layer, in one preallocated buffer, at true relative positions."""

from __future__ import annotations

from torch import Tensor, device, dtype, empty

from infllm_agent.kernels.rotary import Rotary, RotaryTable
from infllm_agent.memory.state import WindowState


class Window:
    """A linear buffer of keys and values that slides towards its front when room there has become free.

    A token's rotary position is its place in the buffer, so angles stay small however long the session is; when the
    window slides its keys are rotated anew from the unrotated ones. Tokens are first *staged* behind ``stop`` and
    become part of the window with ``advance``: a forward that fails midway leaves the window as it was.

    The place of the oldest token is its number in the session modulo ``slack``: it depends on nothing else, so a
    window that is put back by its tokens alone is the same to the bit.

    Args:
        capacity: most tokens held at once, staged ones included.
        slack: further room, so that sliding is rare. Each slide costs one copy of the window.
        with_queries: also keep each token's query, averaged over the query heads that share a key head.
    """

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        rotary: Rotary | None,
        *,
        capacity: int,
        slack: int,
        with_queries: bool,
        dtype: dtype,
        device: device,
    ) -> None:
        self.size = capacity + slack
        self.slack = slack
        self.start = 0
        self.stop = 0
        shape = (kv_heads, self.size, head_dim)
        self.k = empty(shape, dtype=dtype, device=device)  # without rotary, as blocks are stored
        self.v = empty(shape, dtype=dtype, device=device)
        self.rotary = RotaryTable(rotary, self.size, device) if rotary is not None else None
        self.k_rotated = empty(shape, dtype=dtype, device=device) if rotary is not None else self.k
        self.queries = empty(shape, dtype=dtype, device=device) if with_queries else None

    def __len__(self) -> int:
        return self.stop - self.start

    def stage(self, k: Tensor, v: Tensor, queries: Tensor | None = None) -> None:
        """Write the next chunk's tokens, each (kv_heads, n, head_dim), behind the window."""
        n = k.shape[1]
        if self.stop + n > self.size:
            raise ValueError(f"{n} tokens do not fit behind the {len(self)} of a window of {self.size}")
        places = slice(self.stop, self.stop + n)
        self.k[:, places] = k
        self.v[:, places] = v
        if self.rotary is not None:
            self.rotary.rotate(k, self.stop, out=self.k_rotated[:, places])
        if self.queries is not None and queries is not None:
            self.queries[:, places] = queries

    def rotate_queries(self, q: Tensor) -> Tensor:
        """Rotate the queries (q_heads, n, head_dim) of the staged tokens to their places."""
        return self.rotary.rotate(q, self.stop) if self.rotary is not None else q

    def advance(self, n: int) -> None:
        """Make the ``n`` staged tokens part of the window."""
        self.stop += n

    def drop(self, n: int) -> None:
        """Drop the oldest ``n`` tokens."""
        self.start += n
        if self.start >= self.slack:
            self._slide(self.start % self.slack)

    def restore(self, first_token: int, state: WindowState) -> None:
        """Fill an empty window. ``first_token``: number in the session of the oldest one."""
        self.start = self.stop = first_token % self.slack
        self.stage(*state)
        self.advance(state.k.shape[1])

    def held(self) -> WindowState:
        """View the window's tokens, without those that are staged."""
        held = slice(self.start, self.stop)
        return WindowState(
            self.k[:, held], self.v[:, held], self.queries[:, held] if self.queries is not None else None
        )

    def device_bytes(self) -> int:
        """Count the bytes of the buffers; constant."""
        buffers = [self.k, self.v, self.queries]
        if self.rotary is not None:
            buffers.append(self.k_rotated)
        return sum(buffer.nbytes for buffer in buffers if buffer is not None)

    def _slide(self, start: int) -> None:
        places = slice(start, start + len(self))
        for buffer in (self.k, self.v, self.queries):
            if buffer is not None:
                # Source and target may overlap: through a copy.
                buffer[:, places] = buffer[:, self.start : self.stop].clone()
        if self.rotary is not None:
            self.rotary.rotate(self.k[:, places], start, out=self.k_rotated[:, places])
        self.start, self.stop = places.start, places.stop
