"""Blocks from host memory to the device, beside what the device computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class HostGather:
    """Copies rows of arrays in host memory to the device, on a stream of their own.

    A GPU copies while it computes if the host memory is pinned. On a CPU rows are copied at once, and there is nothing
    to wait for.

    Every copy that was begun must be waited for before its target is read, and before the source is given back.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._done: torch.cuda.Event | None = None

    def begin(self, source: Tensor, rows: Sequence[int], target: Tensor) -> None:
        """Copy ``source[rows]`` to ``target``.

        Args:
            source: (n, ...) in host memory, each row in one piece; rows may be far apart.
            target: (len(rows), ...) of the same type on the device, in one piece. What was computed of it before is
                computed first.

        Raises:
            ValueError: shapes, types or places that do not fit together, or a source that is not pinned.
        """
        if target.shape != (len(rows), *source.shape[1:]) or target.dtype != source.dtype:
            raise ValueError(
                f"expected a target {(len(rows), *source.shape[1:])} {source.dtype}, "
                f"got {tuple(target.shape)} {target.dtype}"
            )
        if source.device.type != "cpu" or target.device.type != self.device.type:
            raise ValueError(f"expected a copy from cpu to {self.device}, got {source.device} to {target.device}")
        if rows and not 0 <= min(rows) <= max(rows) < source.shape[0]:
            raise ValueError(f"rows {min(rows)} to {max(rows)} are not all there; there are {source.shape[0]}")
        if self._stream is None:
            torch.index_select(source, 0, torch.tensor(rows, dtype=torch.int64), out=target)
            return
        if not source.is_pinned():
            raise ValueError("the source must be pinned: from other memory a GPU cannot copy while it computes")
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            # Of rows that are apart torch would copy several through memory of its own, which is not pinned.
            together = runs(rows) if source.is_contiguous() else ((row, 1, at) for at, row in enumerate(rows))
            for first, count, at in together:
                target[at : at + count].copy_(source[first : first + count], non_blocking=True)
            target.record_stream(self._stream)
            self._done = self._stream.record_event()

    def wait(self) -> None:
        """What is computed from now on sees what was copied. The host does not wait."""
        if self._done is not None:
            torch.cuda.current_stream(self.device).wait_event(self._done)
            self._done = None

    def finish(self) -> None:
        """The host waits until all is copied: sources may then change."""
        if self._stream is not None:
            self._stream.synchronize()


def runs(rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Rows that follow each other: the first, how many, and where among ``rows``. One copy moves all of a run."""
    begin = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] != rows[end - 1] + 1:
            yield rows[begin], end - begin, begin
            begin = end
