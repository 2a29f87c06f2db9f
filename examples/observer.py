"""An observer that reads a growing log as it grows, and can be asked about it at any time.

Lines go through the model when they come, so a question waits for nothing but its own few tokens. Stop it with
Ctrl-C and start it again: it goes on where it was.

    pip install "infllm-agent[langchain]"
    python examples/observer.py /var/log/syslog --root ./sessions --ask "What has failed?" --every 500
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TextIO

from infllm_agent.integrations.langchain import ChatInfLLM, SessionRunnable


def lines_of(file: TextIO, *, follow: bool) -> Iterator[str]:
    """The file's lines; with ``follow`` also those that are written later."""
    begun = ""
    while True:
        line = begun + file.readline()
        begun = ""
        if line.endswith("\n"):
            yield line
        elif follow:
            begun = line  # half a line: the rest is still to be written
            time.sleep(0.2)
        else:
            if line:
                yield line
            return


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path)
    parser.add_argument("--ask", default="What happened last?")
    parser.add_argument("--every", type=int, default=200, help="ask after so many lines")
    parser.add_argument("--follow", action="store_true", help="wait for more lines at the end")
    parser.add_argument("--root", default=None, help="where sessions are kept")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--max-tokens", type=int, default=48)
    options = parser.parse_args(arguments)
    where = {"root": options.root} if options.root else {}
    llm = ChatInfLLM(model=options.model, max_tokens=options.max_tokens, **where)
    watch = SessionRunnable(llm=llm, session_id=f"log-{options.log.stem}")
    try:
        with options.log.open(errors="replace") as file:
            lines = lines_of(file, follow=options.follow)
            while batch := list(islice(lines, options.every)):
                watch.invoke({"role": "observation", "name": options.log.stem, "text": "".join(batch)}, reply=False)
                answer = watch.invoke(options.ask)
                usage = answer.usage_metadata
                print(f"{usage['input_tokens']} tokens so far. {options.ask}\n  {answer.text}", flush=True)
    except KeyboardInterrupt:
        print("stopped; start again to go on", file=sys.stderr)
    finally:
        llm.close()


if __name__ == "__main__":
    main()
