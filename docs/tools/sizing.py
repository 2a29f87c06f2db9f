"""What a session takes, in bytes, by tier: the tables of docs/operations.md.

    python docs/tools/sizing.py           # print them
    python docs/tools/sizing.py --write   # put them into the page

The figures follow from a model's shape and the memory's settings; tests/project/test_docs.py
compares them with what a memory says of itself.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from infllm_agent.blocks.layout import BlockShape
from infllm_agent.blocks.segments import PAGE as FILE_PAGE
from infllm_agent.blocks.segments import SEGMENT_BLOCKS
from infllm_agent.blocks.store import HOST_BLOCKS
from infllm_agent.config import MemoryConfig
from infllm_agent.memory.index import CELLS, INDEX_STEP
from infllm_agent.memory.state import Division

PAGE = Path(__file__).parents[1] / "operations.md"
LENGTHS = (10_000, 100_000, 1_000_000, 10_000_000)


@dataclass(frozen=True)
class Sizes:
    """A model whose layers all see everything, in bfloat16, with rotary positions, and its memory.

    The shapes below are those of the models' public configurations.
    """

    model: str
    layers: int
    kv_heads: int
    head_dim: int
    config: MemoryConfig = field(default_factory=MemoryConfig)
    dtype: str = "bfloat16"

    @property
    def shape(self) -> BlockShape:
        config = self.config
        return BlockShape(self.layers, self.kv_heads, config.block_size, self.head_dim, self.dtype, config.block_dtype)

    @property
    def key_bytes(self) -> int:
        """One token's keys over all layers; its values are as many."""
        return self.layers * self.kv_heads * self.head_dim * self.shape.torch_dtype.itemsize

    @property
    def disk_bytes_per_token(self) -> float:
        """In sealed blocks: keys, values, checksums, and the block's key."""
        return (self.shape.stride + self.shape.layers * self.shape.key_bytes) / self.config.block_size

    def blocks(self, tokens: int) -> int:
        return Division.of(tokens, self.config).blocks

    def disk_bytes(self, tokens: int) -> int:
        """The files of all sealed blocks."""
        segments = -(-self.blocks(tokens) // SEGMENT_BLOCKS)
        head = FILE_PAGE + SEGMENT_BLOCKS * self.shape.layers * self.shape.key_bytes
        return segments * head + self.blocks(tokens) * self.shape.stride

    def tail_bytes(self, tokens: int) -> int:
        """Sinks and window in the tail's file, without its header."""
        return (tokens - self.blocks(tokens) * self.config.block_size) * 2 * self.key_bytes

    def host_bytes(self, tokens: int) -> int:
        """Host memory of a session that is read in one go: room is taken for ``HOST_BLOCKS`` blocks at a time."""
        room = HOST_BLOCKS * (self.shape.stride + self.shape.layers * self.shape.key_bytes)
        return -(-self.blocks(tokens) // HOST_BLOCKS) * room

    def opening_bytes(self, tokens: int) -> int:
        """What opening a stored session reads of its blocks: their keys for the index."""
        return self.blocks(tokens) * self.shape.layers * self.shape.key_bytes

    @property
    def device_bytes(self) -> int:
        """Window, looked-up keys and cached blocks of all layers: the same at any length."""
        config = self.config
        window = config.window_capacity + max(config.chunk_size, config.n_local // 2)
        window_parts = 3 + (config.block_key == "representatives")  # keys, values, rotated keys; averaged queries
        far = config.n_init + config.topk * config.block_size
        far_parts = 3 if config.positions == "contiguous" else 2
        cached = config.max_cached_block * config.block_size
        kept = config.kept_candidates * config.block_size
        return self.key_bytes * (window_parts * window + far_parts * far + 2 * cached + kept)

    def index_bytes(self, tokens: int, *, resumed: bool = False) -> int:
        """The index: a key for each block and layer; past ``flat_blocks`` also the key's cell in each key head, and the
        cells' centres. Its room doubles as a session grows; a session that is opened takes what it needs, in steps."""
        blocks, rows = self.blocks(tokens), INDEX_STEP
        if resumed and blocks > rows:
            rows = max(2 * rows, -(-blocks // INDEX_STEP) * INDEX_STEP)
        while rows < blocks:
            rows *= 2
        key_bytes = self.kv_heads * self.head_dim * self.shape.torch_dtype.itemsize
        flat = self.config.flat_blocks
        if flat is None or blocks <= flat:
            return self.layers * rows * key_bytes
        return self.layers * (rows * (key_bytes + 2 * self.kv_heads) + CELLS * key_bytes)


MODELS = (
    Sizes("SmolLM2-135M", 30, 3, 64),
    Sizes("Qwen2.5-0.5B", 24, 2, 64),
    Sizes("Llama-3.2-3B", 28, 8, 128),
    Sizes("Llama-3.1-8B", 32, 8, 128),
    Sizes("Qwen3-8B", 36, 8, 128),
    Sizes("Qwen2.5-14B", 48, 8, 128),
    Sizes("Llama-3.3-70B", 80, 8, 128),
)


def tables() -> dict[str, str]:
    """The tables by the names of their places in the page, as Markdown."""
    head = ["model", "shape", "keys and values", "on disk", "device"]
    rows = []
    for sizes in MODELS:
        a_token = [shown(2 * sizes.key_bytes), shown(sizes.disk_bytes_per_token)]
        shape = f"{sizes.layers}, {sizes.kv_heads}, {sizes.head_dim}"
        rows.append([sizes.model, shape, *a_token, shown(sizes.device_bytes)])
    return {
        "shapes": _table(head, rows),
        "disk": _by_length(Sizes.disk_bytes),
        "index": _by_length(Sizes.index_bytes),
        "opening": _by_length(Sizes.opening_bytes),
    }


def _by_length(measure: Callable[[Sizes, int], float]) -> str:
    head = ["model", *(f"{tokens:,}" for tokens in LENGTHS)]
    return _table(head, [[sizes.model, *(shown(measure(sizes, tokens)) for tokens in LENGTHS)] for sizes in MODELS])


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(size: float) -> str:
    """Three figures, in decimal units."""
    units = ["B", "KB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        del units[0]
    return f"{size:.3g}\u00a0{units[0]}"  # kept on one line


def filled(page: str) -> str:
    """The page with its tables as they are now."""
    for name, table in tables().items():
        place = re.compile(rf"(<!-- sizing: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, found = place.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", page)  # type: ignore[misc]
        if found != 1:
            raise ValueError(f"{PAGE.name} has {found} places for the table {name!r}")
    return page


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")
    else:
        print("\n\n".join(tables().values()))
