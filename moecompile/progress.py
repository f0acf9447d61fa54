"""Progress on stderr: a bar for whatever takes more than two seconds, nothing where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Bar:
    """A bar that is moved one step at a time."""

    def __init__(self, inner: tqdm[None]) -> None:
        self._inner = inner

    def show(self, text: str) -> None:
        """One step further, with a word about it."""
        self._inner.set_postfix_str(text, refresh=False)
        self._inner.update()


class Progress:
    """Shows bars, or nothing when quiet."""

    def __init__(self, quiet: bool = True) -> None:
        self.quiet = quiet

    def over(self, items: Iterable[T], text: str, total: int | None = None) -> Iterator[T]:
        """The items, with a bar that appears once two seconds have passed."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        bar = tqdm(items, desc=text, total=total, file=sys.stderr, disable=self.quiet, delay=2, mininterval=0.5, leave=False)
        yield from bar

    @contextmanager
    def bar(self, text: str, total: int, first: int = 0) -> Iterator[Bar]:
        """A bar that is moved by hand, from ``first`` on; it appears once two seconds have passed."""
        with tqdm(
            desc=text, total=total, initial=first, file=sys.stderr, disable=self.quiet, delay=2, mininterval=0.5, leave=False
        ) as inner:
            yield Bar(inner)

    def say(self, text: str) -> None:
        """One line on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)
