"""A progress bar with an estimate of the time left, on standard error."""
from __future__ import annotations

from tqdm import tqdm


class Progress:
    """Call it with what is being done and the share that is done; a context manager."""

    def __enter__(self) -> Progress:
        # Silent where standard error is not a terminal: a log wants no redrawn lines.
        self._bar = tqdm(
            total=100.0,
            leave=False,
            disable=None,
            bar_format="{percentage:3.0f}%|{bar:30}| {elapsed}, about {remaining} more: {desc}",
        )
        return self

    def __call__(self, text: str, share: float) -> None:
        self._bar.set_description_str(text, refresh=False)
        self._bar.update(100.0 * share - self._bar.n)

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
