"""Two processes over gloo (or NCCL) that run a test's function together; started once for all tests.

Run as a program, it is one of these processes: ``ranks.py BACKEND RANK SIZE STORE SOCKET``.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch

__all__ = ["Ranks", "running"]

LIMIT = 120.0  # seconds that one function may take, imports and capture included
KEY = b"ranks of one test"


class Ranks:
    """The processes. ``ranks(function, *arguments)`` gives what the function returned on each."""

    def __init__(self, backend: str, size: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        socket = f"{self.folder.name}/socket"
        self.processes = []
        self.pipes: dict[int, Connection] = {}
        with Listener(socket, "AF_UNIX", authkey=KEY) as listener:
            for rank in range(size):
                arguments = [backend, str(rank), str(size), f"{self.folder.name}/store", socket]
                self.processes.append(subprocess.Popen([sys.executable, __file__, *arguments]))
            for _ in range(size):
                pipe = listener.accept()
                self.pipes[pipe.recv()] = pipe

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run a function of some module on every rank at once.

        Raises:
            AssertionError: it raised on a rank, or took too long; has the rank's traceback.
        """
        for pipe in self.pipes.values():
            pipe.send((function, arguments))
        results = []
        until = time.monotonic() + LIMIT
        for rank, pipe in sorted(self.pipes.items()):
            if not pipe.poll(max(0.0, until - time.monotonic())):
                raise AssertionError(f"rank {rank} did not finish {function.__name__} within {LIMIT:.0f} s")
            try:
                failed, result = pipe.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died in {function.__name__}") from None
            if failed:
                raise AssertionError(f"rank {rank}: {result}")
            results.append(result)
        return results

    def stop(self) -> None:
        """End the processes."""
        for pipe in self.pipes.values():
            pipe.close()
        for process in self.processes:
            process.kill()
            process.wait()
        self.folder.cleanup()


@contextlib.contextmanager
def running(backend: str, size: int = 2) -> Iterator[Callable[..., list[Any]]]:
    """Processes that are started anew after a failure, when they no longer agree on what comes next."""
    ranks: list[Ranks] = []

    def run(function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if not ranks:
            ranks.append(Ranks(backend, size))
        try:
            return ranks[0](function, *arguments)
        except AssertionError:
            ranks.pop().stop()
            raise

    try:
        yield run
    finally:
        for each in ranks:
            each.stop()


def main(backend: str, rank: int, size: int, store: str, socket: str) -> None:
    """Serve functions until the parent is gone."""
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    torch.distributed.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=dt.timedelta(seconds=LIMIT),
    )
    with Client(socket, "AF_UNIX", authkey=KEY) as pipe, contextlib.suppress(EOFError, ConnectionResetError):
        pipe.send(rank)
        while True:
            function, arguments = pipe.recv()
            try:
                pipe.send((False, function(*arguments)))
            except Exception:  # noqa: BLE001 # whatever the function raises is the parent's to report
                pipe.send((True, traceback.format_exc()))


if __name__ == "__main__":
    # The tests are found in the checkout, and the packages where they are installed.
    sys.path.append(str(Path(sys.path.pop(0)).resolve().parents[1]))
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:6])
