"""How a layer attends to a token that is fed alone, on a GPU: keys are read where they lie."""

from __future__ import annotations

from torch import Tensor

from infllm_agent.blocks.device_cache import BlockCache
from infllm_agent.config import MemoryConfig
from infllm_agent.kernels.decode_attention import decode_attention
from infllm_agent.kernels.decode_attention.keys import Angles, Bounds, DecodeKeys
from infllm_agent.memory.far_keys import FarKeys
from infllm_agent.memory.window import Window


class Decoder:
    """Attention of one token to sinks, blocks in their slots of the device cache, and the window.

    Nothing here waits for the device, and every array but the slots is at the same address in each step.
    """

    def __init__(self, config: MemoryConfig, window: Window, far: FarKeys, cache: BlockCache, bounds: Bounds) -> None:
        self._window, self._far, self._cache, self._bounds = window, far, cache, bounds
        self._angles: Angles | None = None
        if window.rotary is not None:
            table = far.rotary or window.rotary
            distance = config.n_local if far.rotary is None else None
            self._angles = Angles(*table.angles, table.rotary.interleaved, distance)

    def attend(self, q: Tensor, slots: Tensor, *, scale: float, softcap: float | None) -> Tensor:
        """Attend with the token that is staged behind the window: (q_heads, 1, head_dim).

        Args:
            q: (q_heads, 1, head_dim) without rotary embedding.
            slots: (blocks,) int32, where in the cache the looked-up blocks lie, in their order.
        """
        return decode_attention(q[:, 0], self.keys(slots), scale=scale, softcap=softcap).out

    def keys(self, slots: Tensor) -> DecodeKeys:
        """Gather what that token attends to."""
        window, far, cache = self._window, self._far, self._cache
        bounds = self._bounds.set(far.n_sinks, len(slots), window.start, window.stop + 1)
        return DecodeKeys(
            far.k, far.v, cache.k, cache.v, slots, window.k_rotated, window.v, bounds=bounds, angles=self._angles
        )
