"""Draw docs/memory.svg, the picture of how the memory works: python docs/tools/figure.py

Its numbers are the defaults of MemoryConfig.
"""

from __future__ import annotations

from pathlib import Path

from infllm_agent.config import MemoryConfig

TARGET = Path(__file__).parents[1] / "memory.svg"

WIDTH, HEIGHT = 900, 562
PAPER, SHELF, INK, QUIET, RULE = "#ffffff", "#f5f7fa", "#1f2933", "#52606d", "#cbd2d9"
SINKS, BLOCK, CHOSEN, WINDOW, CHUNK = "#b8c4ce", "#e4ebf1", "#f0a868", "#8fbce6", "#9fd3a8"
ARROW = "#b3541e"

BLOCKS, PITCH, SIDE = 17, 25, 21
CHOSEN_BLOCKS = (2, 7, 8, 13)
CACHED_BLOCKS = (2, 4, 7, 8, 11, 13, 16)
LEFT, BLOCKS_LEFT = 40, 132
WINDOW_LEFT, WINDOW_WIDTH, CHUNK_WIDTH = 570, 180, 110
CHUNK_LEFT = WINDOW_LEFT + WINDOW_WIDTH + 4


def text(
    x: float, y: float, words: str, *, size: int = 15, color: str = INK, anchor: str = "start", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{weight}>{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, *, line: str = "none") -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{fill}" stroke="{line}"/>'


def arrow(path: str) -> str:
    return f'<path d="{path}" fill="none" stroke="{ARROW}" stroke-width="2" marker-end="url(#tip)"/>'


def middle(left: float, width: float) -> float:
    return left + width / 2


def block_x(number: int) -> int:
    return BLOCKS_LEFT + number * PITCH


def draw(config: MemoryConfig) -> str:
    return "\n".join([*_head(config), *_session(config), *_tiers(config), *_seen(config), "</svg>", ""])


def _head(config: MemoryConfig) -> list[str]:
    told = (
        "A session's tokens in time: sinks, sealed blocks, the window and the chunk being read. The chunk's queries "
        f"look up {config.topk} blocks, which are brought to the device; attention sees the sinks, these blocks, the "
        "window and the chunk as one text."
    )
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        " font-family=\"system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif\">",
        "<title>How the memory works</title>",
        f"<desc>{told}</desc>",
        f'<defs><marker id="tip" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 10 5 0 10z" fill="{ARROW}"/></marker></defs>',
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="10" fill="{PAPER}" stroke="{RULE}"/>',
    ]


def _session(config: MemoryConfig) -> list[str]:
    """The strip of all tokens, and the lookup above it."""
    y, height = 150, 44
    last = BLOCKS_LEFT + BLOCKS * PITCH - (PITCH - SIDE)
    parts = [
        text(LEFT, 36, "One session, oldest token first", size=17, bold=True),
        box(LEFT, y, 84, height, SINKS),
        text(LEFT + 42, y + 27, "sinks", anchor="middle"),
        box(WINDOW_LEFT, y, WINDOW_WIDTH, height, WINDOW),
        text(middle(WINDOW_LEFT, WINDOW_WIDTH), y + 27, "window", anchor="middle"),
        box(CHUNK_LEFT, y, CHUNK_WIDTH, height, CHUNK),
        text(middle(CHUNK_LEFT, CHUNK_WIDTH), y + 27, "chunk", anchor="middle"),
    ]
    parts += [
        box(block_x(number), y, SIDE, height, CHOSEN if number in CHOSEN_BLOCKS else BLOCK) for number in range(BLOCKS)
    ]
    below = y + height + 20
    parts += [
        text(LEFT + 42, below, f"first {config.n_init}", size=14, color=QUIET, anchor="middle"),
        text(
            middle(BLOCKS_LEFT, last - BLOCKS_LEFT),
            below,
            f"sealed blocks of {config.block_size} tokens: all the rest",
            size=14,
            color=QUIET,
            anchor="middle",
        ),
        text(
            middle(WINDOW_LEFT, WINDOW_WIDTH), below, f"latest {config.n_local}", size=14, color=QUIET, anchor="middle"
        ),
        text(
            middle(CHUNK_LEFT, CHUNK_WIDTH),
            below,
            f"next {config.chunk_size} or fewer",
            size=14,
            color=QUIET,
            anchor="middle",
        ),
    ]
    # The lookup: from the chunk, over the window, down to the blocks it chose.
    start, top = middle(CHUNK_LEFT, CHUNK_WIDTH), 108
    first = block_x(CHOSEN_BLOCKS[0]) + SIDE / 2
    parts.append(
        f'<path d="M{start} {y - 4} V{top + 14} q0 -14 -14 -14 H{first + 14}" fill="none" stroke="{ARROW}"'
        ' stroke-width="2"/>'
    )
    parts.append(arrow(f"M{first + 14} {top} q-14 0 -14 14 V{y - 4}"))
    parts += [arrow(f"M{block_x(n) + SIDE / 2} {top} V{y - 4}") for n in CHOSEN_BLOCKS[1:]]
    parts += [
        text(first + 14, 68, "Look up", color=ARROW, bold=True),
        text(
            first + 86,
            68,
            "The chunk's queries vote among all blocks by their mean keys; the best",
            size=14,
        ),
        text(
            first + 86,
            88,
            f"{config.candidates} are compared once more by all their keys; {config.topk} of them are taken, "
            "in each layer.",
            size=14,
        ),
    ]
    return parts


def _tiers(config: MemoryConfig) -> list[str]:
    """Where the blocks' bytes lie."""
    y = 262
    host, device = y + 18, y + 70
    cached = config.max_cached_block
    kept = f"On the device: the {cached} blocks of each layer that were used last, and the index of mean keys."
    parts = [
        text(LEFT, y, "Where it lies", size=17, bold=True),
        text(BLOCKS_LEFT + 36, y, kept, size=14, color=QUIET),
        box(LEFT, host, BLOCKS_LEFT + BLOCKS * PITCH + 4 - LEFT, 40, SHELF, line=RULE),
        text(LEFT + 10, host + 17, "host or", size=14),
        text(LEFT + 10, host + 33, "files", size=14),
        text(WINDOW_LEFT + 8, host + 17, "Blocks are stored with unrotated keys", size=14, color=QUIET),
        text(WINDOW_LEFT + 8, host + 35, "and never change again.", size=14, color=QUIET),
        box(LEFT, device, CHUNK_LEFT + CHUNK_WIDTH + 8 - LEFT, 40, SHELF, line=RULE),
        text(LEFT + 10, device + 25, "device", size=14),
        box(WINDOW_LEFT, device + 8, WINDOW_WIDTH, 24, WINDOW),
        box(CHUNK_LEFT, device + 8, CHUNK_WIDTH, 24, CHUNK),
    ]
    for number in range(BLOCKS):
        fill = CHOSEN if number in CHOSEN_BLOCKS else BLOCK
        parts.append(box(block_x(number), host + 8, SIDE, 24, fill, line=RULE))
        if number in CACHED_BLOCKS:
            parts.append(box(block_x(number), device + 8, SIDE, 24, fill, line=RULE))
        if number in CHOSEN_BLOCKS:
            x = block_x(number) + SIDE / 2
            parts.append(arrow(f"M{x} {host + 33} V{device + 6}"))
    return parts


def _seen(config: MemoryConfig) -> list[str]:
    """What attention sees: one text without gaps."""
    y, height, size = 458, 44, 40
    strip = WINDOW_LEFT - 4 - len(CHOSEN_BLOCKS) * size
    sinks = strip - 88
    end = CHUNK_LEFT + CHUNK_WIDTH
    ruler = y + height + 14
    parts = [
        text(LEFT, y - 16, "What attention sees", size=17, bold=True),
        text(LEFT, y + 18, "Blocks in order, at positions as", size=14, color=QUIET),
        text(LEFT, y + 36, "if nothing lay between them.", size=14, color=QUIET),
        box(sinks, y, 84, height, SINKS),
        text(sinks + 42, y + 27, "sinks", anchor="middle"),
        box(WINDOW_LEFT, y, WINDOW_WIDTH, height, WINDOW),
        text(middle(WINDOW_LEFT, WINDOW_WIDTH), y + 27, "window", anchor="middle"),
        box(CHUNK_LEFT, y, CHUNK_WIDTH, height, CHUNK),
        text(middle(CHUNK_LEFT, CHUNK_WIDTH), y + 27, "chunk", anchor="middle"),
        f'<path d="M{sinks} {ruler} H{end} M{sinks} {ruler - 5} v10 M{end} {ruler - 5} v10" fill="none"'
        f' stroke="{QUIET}" stroke-width="1.5"/>',
        text(sinks, ruler + 23, "position 0", size=14, color=QUIET),
        text(
            middle(sinks, end - sinks),
            ruler + 23,
            f"one softmax over at most {config.attended_keys:,} keys",
            size=14,
            anchor="middle",
        ),
        text(end, ruler + 23, f"{config.attended_keys - 1:,}", size=14, color=QUIET, anchor="end"),
    ]
    for place, number in enumerate(CHOSEN_BLOCKS):
        x = strip + place * size
        parts.append(box(x, y, size - 3, height, CHOSEN))
        parts.append(arrow(f"M{block_x(number) + SIDE / 2} 366 L{x + size / 2} {y - 4}"))
    return parts


if __name__ == "__main__":
    TARGET.write_text(draw(MemoryConfig()), "utf-8")
