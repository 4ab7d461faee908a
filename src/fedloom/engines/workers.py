"""Sites side by side: processes that are forks of this one, with the backbone in memory that all share.

A site's part of a round is a function of what it is given and of what its store holds, so that which process runs it
changes no bit. Each worker has one thread. What one logs is logged here, in the order of the calls. A worker ends with
the process that began it, however that ends.
"""

import logging
import multiprocessing
import os
import queue
import signal
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from fedloom.errors import RunError


class Workers:
    """Processes that all run `work`, a function of one call; calls and what is made of them are pickled, `work` not."""

    def __init__(self, work: Callable[[Any], Any], n: int):
        context = multiprocessing.get_context("fork")
        self._ends: list[Connection] = []
        processes: list[BaseProcess] = []
        for _ in range(n):
            own, its = context.Pipe()
            self._ends.append(own)
            processes.append(context.Process(target=_serve, args=(work, its, [*self._ends]), daemon=True))
            processes[-1].start()
            its.close()
        self.close = weakref.finalize(self, _end, processes)

    def run(self, calls: Sequence[Any]) -> Iterator[Any]:
        """What `work` makes of each call, in their order; the i-th is always that of one worker. Nothing may be run
        after calls whose results were not all taken.

        raises what a call raised; RunError: a worker is gone
        """
        n, left = len(self._ends), len(calls)
        try:
            for i, end in enumerate(self._ends):
                end.send(calls[i::n])
            for i in range(len(calls)):
                made, told = self._ends[i % n].recv()
                left -= 1
                for record in told:
                    logging.getLogger(record.name).handle(record)
                if isinstance(made, BaseException):
                    raise made
                yield made
        except (EOFError, ConnectionError):
            raise RunError(
                "a worker process was ended from outside, as a system does that is out of memory; lower "
                "[federation] workers, and go on with --resume."
            ) from None
        finally:
            if left:
                self.close()


def _serve(work: Callable[[Any], Any], end: Connection, others: Sequence[Connection]) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the first process that is interrupted
    threading.Thread(target=_outlive, daemon=True).start()
    for other in others:  # or one's own pipe would never be seen to end
        other.close()
    torch.set_num_threads(1)
    told: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    logger = logging.getLogger("fedloom")
    logger.handlers, logger.propagate = [QueueHandler(told)], False
    while True:
        try:
            calls = end.recv()
        except EOFError:
            return
        for call in calls:
            try:
                made = work(call)
            except BaseException as e:  # it is raised again where the call was made
                e.add_note(traceback.format_exc())
                made = e
            end.send((made, [told.get() for _ in range(told.qsize())]))


def _outlive() -> None:
    """End this process when its parent has ended, in the midst of whatever it does; stores are written whole."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()
