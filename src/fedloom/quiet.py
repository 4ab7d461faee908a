"""A logger that holds its warnings back, where a model or a site is made up and they are of nothing that is there."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(logger: str = "fedloom") -> Iterator[None]:
    """Errors alone, of this logger and those below it."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
