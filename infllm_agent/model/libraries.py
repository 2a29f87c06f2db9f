"""What the model libraries say: silenced, and their errors in one line."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' warnings and progress bars: what the user should know goes through ``progress``."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as library_log

    verbosity, bars = library_log.get_verbosity(), library_log.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    library_log.set_verbosity(logging.ERROR)
    library_log.disable_progress_bar()  # type: ignore[no-untyped-call]
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        library_log.set_verbosity(verbosity)
        if bars:
            library_log.enable_progress_bar()  # type: ignore[no-untyped-call]
        if hub_bars:
            enable_progress_bars()


def one_line(error: BaseException) -> str:
    """Write an error as part of one line."""
    text = str(error.strerror or error) if isinstance(error, OSError) and error.strerror else str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return first.rstrip(".")
