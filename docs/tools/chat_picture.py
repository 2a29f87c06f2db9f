"""Draw docs/chat.svg from a real chat in a pseudo-terminal: python docs/tools/chat_picture.py"""

from __future__ import annotations

import io
import random
import re
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "helpers"))
from terminal import Terminal

COLUMNS, ROWS = 96, 30
QUESTION = "What does it mean that the disk of a host is full?"
DIM = 90  # pyte knows no dim characters: they are drawn grey


class Screen(pyte.Screen):
    def select_graphic_rendition(self, *codes: int, **more: bool) -> None:
        super().select_graphic_rendition(*(DIM if code == 2 else code for code in codes), **more)


def log() -> str:
    dice = random.Random(1)
    asked = ["GET /orders", "GET /users", "POST /carts"]
    lines = [f"10:{i:02} {dice.choice(asked)} 200 in {dice.randint(9, 90)} ms" for i in range(60)]
    lines[20] = "10:20 deploy of service payments-api failed: the disk of host db-7 is full"
    return "\n".join(lines)


def talk(root: str) -> pyte.Screen:
    program, where = [sys.executable, "-m", "infllm_agent"], ["ops", "--root", root]
    ingest = [*program, "ingest", *where, "--lines", "--role", "tool", "--name", "kubectl"]
    subprocess.run(ingest, input=log(), text=True, check=True)
    terminal = Terminal([*program, "chat", *where, "--max-tokens", "80"], rows=ROWS, columns=COLUMNS, screen=Screen)
    terminal.wait("idle")
    for number, line in enumerate(
        ["What does it mean that the disk of a host is full?", "/inspect", "/search db-7"], 2
    ):
        terminal.type(line)
        terminal.wait(line)
        terminal.type("\r")
        terminal.wait(lambda n=number: "idle" in terminal.text and len(re.findall(r"^>", terminal.text, re.M)) == n)  # type: ignore[misc]
    terminal.type("/fork what-if 20")
    terminal.wait("what-if 20")
    return terminal.screen


def drawn(screen: pyte.Screen) -> str:
    console = Console(record=True, width=COLUMNS, force_terminal=True, file=io.StringIO(), highlight=False)
    for y in range(screen.lines):
        row = Text()
        for style, cells in groupby((screen.buffer[y][x] for x in range(screen.columns)), _style):
            row.append("".join(cell.data for cell in cells), style)
        console.print(row, no_wrap=True, soft_wrap=True)
    svg = console.export_svg(title="infllm-agent chat ops")
    # The exporter names a font to be fetched from the web; the viewer's own monospace font will do.
    return re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)


def _style(cell: pyte.screens.Char) -> Style:
    grey = "bright_black" if cell.fg == "brightblack" else None
    return Style(bold=cell.bold, reverse=cell.reverse, color=grey)


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        (Path(__file__).parents[1] / "chat.svg").write_text(drawn(talk(root)))


if __name__ == "__main__":
    main()
