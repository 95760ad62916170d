"""Work that goes on beside a notebook, in a second process: the same calls, the same numbers, in less time.

    later = beside.start(this, relatives_evidence.tokens, this, MODEL, "full-0")
    ...                              # the notebook goes on
    rows = later.result              # makes it here if the other process has not come to it; else waits, and does not idle

Arguments and results travel through a pipe between the two processes; nothing of them is written to disk.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from helpers.errors import InputError
from helpers.study import Study

T = TypeVar("T")
P = ParamSpec("P")
MANY_PAIRS = 300  # fewer are measured before a process has started
SMALL = 1 << 28  # bytes of weights: the second process has a copy of its own
SWITCH = "COMPANION_BESIDE"


@dataclass(frozen=True)
class Later(Generic[T]):
    """A result that is asked for now and used later; what no other process has begun is computed when it is read."""

    work: Callable[[], T]
    there: Future[bytes] | None  # in the second process; None without one
    here: Future[T] = field(default_factory=Future)  # what this process did itself

    @cached_property
    def result(self) -> T:
        """What the call gives, or the exception that it raised. InputError if the second process has died.

        As long as the second process works on it, this one does what waits last in the line.
        """
        if self.there is None:
            return self.work()
        self._take()
        while _waiting and not (self.here.done() or self.there.done()):
            _waiting.pop()._take()
        if self.here.done():
            return self.here.result()
        try:
            return pickle.loads(self.there.result())
        except BrokenProcessPool:
            raise InputError(
                "the process that works beside this notebook ended before its work was done (was there enough "
                f"memory?): run again, with {SWITCH}=0 in the environment to do everything in one process"
            ) from None

    def _take(self) -> None:
        """Does it here, unless it was begun. What is raised is kept for whoever reads the result."""
        if not self.here.done() and self.there is not None and self.there.cancel():
            try:
                self.here.set_result(self.work())
            except Exception as error:
                self.here.set_exception(error)


_waiting: list[Later[Any]] = []  # in the order of their start; those that were begun are passed over


def start(study: Study, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Later[T]:
    """Call a function of a module beside the notebook. Calls are done one after the other, in the order of their start."""
    work = partial(function, *args, **kwargs)
    # Copied here and now: the executor would do it while the next cell has its hooks on the model.
    later = Later(work, _line().submit(_there, pickle.dumps(work)) if pays(study) else None)
    _waiting[:] = [one for one in (*_waiting, later) if one.there is not None and not one.there.done()]
    return later


def pays(study: Study) -> bool:
    """Whether a second process is worth it: a small model on the CPU, many pairs, and two processors.

    On a GPU, and for a large model, there is no room for a second copy. `COMPANION_BESIDE=0` says no to all.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in study.subject.model.parameters())
    is_small = study.subject.device.type == "cpu" and weights <= SMALL
    wanted = os.environ.get(SWITCH, "1") != "0" and _processors() > 1
    return wanted and is_small and len(study.pairs) >= MANY_PAIRS


def _processors() -> int:
    """How many this process may use; not every system has an affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _line() -> ThreadPoolExecutor:
    """Calls wait here, where they can be taken back: a pool of processes fetches the next one before it is needed."""
    return ThreadPoolExecutor(1)


def _there(work: bytes) -> bytes:
    try:
        return _pool().submit(_done, work).result()
    except BrokenProcessPool:
        _pool.cache_clear()  # the next call has a new process
        raise


@cache
def _pool() -> ProcessPoolExecutor:
    """The one second process. It is spawned: a fork would inherit locks of this process's threads."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=_begin, initargs=(torch.get_num_threads(),))


def _done(work: bytes) -> bytes:
    return pickle.dumps(pickle.loads(work)())


def _begin(n_threads: int) -> None:
    """As many threads as the notebook has, or last bits could differ; no progress bars; and the notebook's end is its own."""
    torch.set_num_threads(n_threads)
    os.environ["TQDM_DISABLE"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a cell that is interrupted waits no longer; the work goes on
    threading.Thread(target=_end_with_the_notebook, daemon=True).start()


def _end_with_the_notebook() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
