"""Two processes joined by gloo, started once a session, that run functions on both ranks."""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import inspect
import multiprocessing
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

START_SECONDS = 120.0


class GlooPool:
    """Worker processes in one gloo group; usable as a context manager.

    Args:
        size: number of processes.
    """

    def __init__(self, size: int = 2) -> None:
        self.size = size
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> GlooPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
        """Calls ``function(*arguments)`` on every rank at once.

        Args:
            function: defined at the top of a module or test file.
            arguments: the same for every rank; picklable.
            timeout: seconds until the slowest rank must have answered.

        Returns:
            The ranks' results, in rank order.

        Raises:
            RuntimeError: a rank raised, with its traceback; the group is then started anew at the next call.
            TimeoutError: a rank did not answer in time.
        """
        if not self._processes:
            self._start()
        # Arguments by themselves: their classes may live in the file that the address leads to.
        message = pickle.dumps((_address(function), pickle.dumps(arguments)))
        for pipe in self._pipes:
            pipe.send_bytes(message)
        return self._collect(time.monotonic() + timeout)

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self._pipes:
            try:
                pipe.send_bytes(pickle.dumps(None))
            except OSError:
                continue  # that process is gone already
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = Path(tempfile.mkdtemp(prefix="armillary-gloo-")) / "store"
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, self.size, str(store)), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)
        self._collect(time.monotonic() + START_SECONDS)

    def _collect(self, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < self.size:
            for rank, pipe in enumerate(self._pipes):
                if rank in results or not pipe.poll(0.005):
                    continue
                try:
                    done, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    done, value = False, f"the process died with exit code {self._processes[rank].exitcode}"
                if not done:
                    self._abandon()
                    raise RuntimeError(f"rank {rank}: {value}")
                results[rank] = value
            if time.monotonic() > deadline:
                silent = sorted(set(range(self.size)) - set(results))
                self._abandon()
                raise TimeoutError(f"no answer from ranks {silent}")
        return [results[rank] for rank in range(self.size)]

    def _abandon(self) -> None:
        # The other ranks may wait in a collective for ever, so that asking them to end would not help.
        for process in self._processes:
            process.kill()
        self.close()


@cache
def shared_pool() -> GlooPool:
    """The session's pool of two processes, started at its first use and ended with the interpreter."""
    pool = GlooPool()
    atexit.register(pool.close)
    return pool


def _address(function: Callable[..., Any]) -> tuple[str, str, str]:
    return function.__module__, str(Path(inspect.getfile(function)).absolute()), function.__qualname__


def _resolve(module_name: str, file: str, qualname: str) -> Callable[..., Any]:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError:
        # Test files are no packages: pytest loads them by path, and so does the worker.
        spec = importlib.util.spec_from_file_location(module_name, file)
        if spec is None or spec.loader is None:
            raise
        module = importlib.util.module_from_spec(spec)
        parents = module_name.split(".")[:-1]
        for depth in range(1, len(parents) + 1):
            sys.modules.setdefault(".".join(parents[:depth]), ModuleType(parents[depth - 1]))
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]


def _serve(pipe: Connection, rank: int, size: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    pipe.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            message = pickle.loads(pipe.recv_bytes())
        except EOFError:
            break  # the parent is gone
        if message is None:
            break
        address, arguments = message
        try:
            function = _resolve(*address)
            answer = pickle.dumps((True, function(*pickle.loads(arguments))))
        except Exception:  # noqa: BLE001 - whatever a test raises is reported to the parent
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)
    dist.destroy_process_group()
