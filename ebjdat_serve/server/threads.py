"""Work in threads that nobody waits for when the process ends: those of asyncio's executor are joined, whatever they wait for."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_daemon_thread(work: Callable[[], T]) -> "asyncio.Future[T]":
    """Return the future result of ``work``, which a thread of its own begins at once, and which may touch files that hang.

    The result is an OSError where the system has no thread left.
    """
    done: Future[T] = Future()
    done.set_running_or_notify_cancel()  # or one that nobody awaits any more could not take its result

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 (who awaits the future gets it)
            done.set_exception(error)

    try:
        threading.Thread(target=run, daemon=True, name="files").start()
    except RuntimeError as error:
        done.set_exception(OSError(str(error)))
    return asyncio.wrap_future(done)
