"""Rotary position embedding (RoPE) as the memory needs it: any integer position, any model's layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """How one layer turns a position into a rotation of its queries and keys.

    Args:
        inv_freq: (rotary_dim / 2,) angles per position in radians; the first ``rotary_dim`` channels of a head
            rotate, the rest pass through (partial rotary).
        interleaved: True if channels (0, 1), (2, 3), ... are rotated together (GLM, Cohere); False if channel i
            goes with i + rotary_dim / 2 (Llama and most others).
    """

    inv_freq: Tensor
    interleaved: bool

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute cosines and sines, each (n, rotary_dim / 2) float32, of (n,) integer positions.

        Computed in float64: in float32 an angle loses its fraction past about a million positions.
        """
        phase = positions.to(torch.float64)[:, None] * self.inv_freq.to(positions.device, torch.float64)
        return phase.cos().float(), phase.sin().float()

    def rotate(self, x: Tensor, angles: tuple[Tensor, Tensor], out: Tensor | None = None) -> Tensor:
        """Rotate ``x`` (..., n, head_dim) by ``angles`` of (n, rotary_dim / 2), or (1, ...) for one angle for all.

        Args:
            out: as ``x``, to be written to; None: a new tensor.
        """
        cos, sin = angles
        half = cos.shape[-1]
        out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        wide = x[..., : 2 * half].float()  # once: products of mixed dtypes take a slow path
        if self.interleaved:
            first, second = wide[..., 0::2], wide[..., 1::2]
            out_first, out_second = out[..., 0 : 2 * half : 2], out[..., 1 : 2 * half : 2]
        else:
            first, second = wide[..., :half], wide[..., half:]
            out_first, out_second = out[..., :half], out[..., half : 2 * half]
        out_first.copy_((first * cos).addcmul_(second, sin, value=-1))
        out_second.copy_((second * cos).addcmul_(first, sin))
        if x.shape[-1] > 2 * half:
            out[..., 2 * half :] = x[..., 2 * half :]
        return out


class RotaryTable:
    """The angles of positions 0 .. length - 1, computed once for all layers and sessions that rotate alike."""

    def __init__(self, rotary: Rotary, length: int, device: torch.device) -> None:
        self.rotary = rotary
        frequencies = rotary.inv_freq.cpu().numpy()
        self._cos, self._sin = _angles(frequencies.tobytes(), frequencies.dtype.name, length, device)

    @property
    def angles(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each (length, rotary_dim / 2) float32."""
        return self._cos, self._sin

    def rotate(self, x: Tensor, start: int, out: Tensor | None = None) -> Tensor:
        """Rotate ``x`` (..., n, head_dim) as positions ``start .. start + n - 1``, into ``out`` if it is given."""
        stop = start + x.shape[-2]
        if start < 0 or stop > self._cos.shape[0]:
            raise ValueError(f"positions {start}..{stop - 1} lie outside the table's {self._cos.shape[0]} positions")
        return self.rotary.rotate(x, (self._cos[start:stop], self._sin[start:stop]), out)

    def rotate_all_to(self, x: Tensor, position: int) -> Tensor:
        """Rotate every row of ``x`` (..., n, head_dim) by the one angle of ``position``."""
        return self.rotary.rotate(x, (self._cos[position : position + 1], self._sin[position : position + 1]))


@lru_cache(maxsize=32)
def _angles(inv_freq: bytes, dtype: str, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    frequencies = torch.frombuffer(bytearray(inv_freq), dtype=getattr(torch, dtype))
    return Rotary(frequencies, interleaved=False).angles(torch.arange(length, device=device))
