"""The bytes of a sealed block, in host memory and on disk alike.

A block is a *record*: for each layer a plane of keys and a plane of values, at places that follow from their number.

    record = plane 0 (keys of layer 0) | plane 1 (values of layer 0) | plane 2 (keys of layer 1) | ...
    plane  = (kv_heads, block_size, head_dim) in the model's dtype, or as int8 with the scale of each head behind it,
             and for keys their mean, which is taken off before they are rounded
           | CRC-32 | zeros up to a multiple of 8 bytes

A plane's CRC-32 begins with its number and its block's: planes that lie in each other's place fail it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from infllm_agent.config import BlockDtype
from infllm_agent.kernels.int8 import dequantize, quantize

CRC_BYTES = 4


@dataclass(frozen=True)
class BlockShape:
    """What a block holds.

    Args:
        dtype: of the model's keys and values: a torch dtype's name, such as ``bfloat16``.
        stored: how blocks are stored: in that dtype, or as int8.
    """

    layers: int
    kv_heads: int
    block_size: int
    head_dim: int
    dtype: str
    stored: BlockDtype = "model"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def planes(self) -> int:
        """Two for each layer: its keys, its values."""
        return 2 * self.layers

    def plane_bytes(self, plane: int) -> int:
        """Bytes of a plane without its checksum."""
        numbers = self.kv_heads * self.block_size * self.head_dim
        if self.stored == "model":
            return numbers * self.torch_dtype.itemsize
        return numbers + 4 * self.kv_heads + (self.key_bytes if is_keys(plane) else 0)

    @property
    def key_bytes(self) -> int:
        """Bytes of the one key (kv_heads, head_dim) that stands for a block in one layer."""
        return self.kv_heads * self.head_dim * self.torch_dtype.itemsize

    def place(self, plane: int) -> int:
        """Where in a record a plane begins."""
        return (plane // 2) * (self._stride(0) + self._stride(1)) + (plane % 2) * self._stride(0)

    @property
    def stride(self) -> int:
        """Bytes from one record to the next."""
        return self.layers * (self._stride(0) + self._stride(1))

    def _stride(self, plane: int) -> int:
        return -(-(self.plane_bytes(plane) + CRC_BYTES) // 8) * 8


def is_keys(plane: int) -> bool:
    return plane % 2 == 0


def encode(x: Tensor, plane: int, shape: BlockShape) -> Tensor:
    """The bytes (n, plane_bytes) of one plane of n blocks, (n, kv_heads, block_size, head_dim), on the CPU."""
    n = x.shape[0]
    if shape.stored == "model":
        return _bytes(x.to("cpu", shape.torch_dtype))
    means = []
    if is_keys(plane):
        mean = x.mean(dim=2, dtype=torch.float32).to(shape.torch_dtype)
        x = x.float() - mean.float().unsqueeze(2)
        means = [_bytes(mean.cpu())]
    q, scales = quantize(x)
    return torch.cat([q.cpu().reshape(n, -1).view(torch.uint8), _bytes(scales.cpu()), *means], dim=1)


def decode(raw: Tensor, plane: int, shape: BlockShape) -> Tensor:
    """What was encoded, to the bit or to the nearest of 255 steps: (n, kv_heads, block_size, head_dim).

    Args:
        raw: (n, ≥ plane_bytes) uint8, on any device; the result is there too.
    """
    n, heads, size, dim = raw.shape[0], shape.kv_heads, shape.block_size, shape.head_dim
    if shape.stored == "model":
        return raw[:, : shape.plane_bytes(plane)].view(shape.torch_dtype).view(n, heads, size, dim)
    numbers, behind = heads * size * dim, heads * size * dim + 4 * heads
    q = raw[:, :numbers].view(torch.int8).view(n, heads, size, dim)
    x = dequantize(q, raw[:, numbers:behind].contiguous().view(torch.float32))
    if is_keys(plane):
        mean = raw[:, behind : behind + shape.key_bytes].contiguous().view(shape.torch_dtype).view(n, heads, 1, dim)
        x += mean.float()
    return x.to(shape.torch_dtype)


def checksum(data: memoryview, block: int, plane: int) -> bytes:
    """The CRC-32 of a plane's bytes, as it lies behind them."""
    return zlib.crc32(data, zlib.crc32(f"{block}:{plane}".encode())).to_bytes(CRC_BYTES, "little")


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(x.shape[0], -1).view(torch.uint8)
