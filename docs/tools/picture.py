"""Draw docs/demo.svg from a real run of the demo: python docs/tools/picture.py"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from rich.console import Console

from infllm_agent.cli.demo import run


def main() -> None:
    console = Console(record=True, width=110, force_terminal=True, highlight=False)
    with tempfile.TemporaryDirectory() as root:
        run(Path(root), console=console)
    drawn = console.export_svg(title="infllm-agent demo")
    # The exporter names a font to be fetched from the web; the viewer's own monospace font will do.
    drawn = re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL)
    (Path(__file__).parents[1] / "demo.svg").write_text(drawn)


if __name__ == "__main__":
    main()
