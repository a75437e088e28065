"""vLLM in a process of its own, started by the trainer and ended with it.

It is not started in the trainer's process, because vLLM changes the process it runs in: it sets up torch.distributed
for itself, and on a CPU ``torch.set_num_threads`` has no effect beside it. The two talk over a socket, (method,
arguments) one way and the answer the other; weights go through files (``weights``).

vLLM starts with random weights in the shape of the policy, whose configuration is all that it is given, and waits for
the policy's own. So a policy that exists only in memory can be served as well as one on a disk.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torch import Tensor

from ..call.checks import require_number
from .protocol import RESUME, EngineError, Facts, Generated, Model, Request, WeightsLost
from .weights import BUCKET_BYTES, buckets, folder_for, written

# Set by launchers for the trainer's processes; vLLM would take itself for one of them.
LAUNCHERS = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR",
    "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE",
)  # fmt: skip


class VLLMProcess:
    """An ``Engine``: vLLM in a child process.

    Args:
        timeout: seconds that a call may take; ``start`` may take as long again.
        bucket_bytes: size of the files in which weights go over.
        log: file to which vLLM writes; by default one in a temporary folder.
        python: interpreter of the environment in which vLLM and this package are installed; by default this one.
        environment: variables to add to the child's environment. Without ``tensor_parallel_size`` the child sees the
            GPU of the trainer's process alone, unless CUDA_VISIBLE_DEVICES is given here.
        options: arguments of ``vllm.LLM``, such as ``gpu_memory_utilization`` or ``max_model_len``.
    """

    shared = False

    def __init__(
        self,
        *,
        timeout: float = 600.0,
        bucket_bytes: int = BUCKET_BYTES,
        log: str | Path | None = None,
        python: str | None = None,
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        require_number("timeout", timeout, positive=True)
        self.timeout = timeout
        self.bucket_bytes = bucket_bytes
        self.log = log
        self.python = sys.executable if python is None else python
        self.environment = environment or {}
        self.options = options
        self._child: Child | None = None
        self._version: str | None = None

    def start(self, model: Model) -> Facts:
        """Starts vLLM with random weights in the shape of ``model``.

        Raises:
            EngineError: where vLLM is not installed, does not start, or takes longer than twice ``timeout``.
        """
        self.stop()
        alone = self.options.get("tensor_parallel_size", 1) == 1
        environment = {**(same_gpu(model.device) if alone else {}), **self.environment}
        child = self._child = Child(self.python, environment, self.log, self.bucket_bytes)
        model.config.save_pretrained(child.folder)
        defaults = {
            "dtype": model.dtype, "load_format": "dummy", "skip_tokenizer_init": True, "disable_log_stats": True,
        }  # fmt: skip
        options = {**defaults, **self.options, "model": str(child.folder)}
        facts = child.call("start", 2 * self.timeout, options=options)
        return Facts(facts["config"], facts["max_length"])

    def take_weights(self, weights: Iterable[tuple[str, Tensor]], version: str) -> None:
        child = self._running()
        self._version = None
        child.call("start_weight_update", self.timeout)
        for bucket in buckets(weights, self.bucket_bytes):
            with written(bucket, child.folder) as path:
                child.call("update_weights", self.timeout, path=str(path))
        child.call("finish_weight_update", self.timeout, version=version)
        self._version = version

    def generate(self, request: Request, version: str) -> Generated:
        if version != self._version:
            raise WeightsLost(f"vLLM has the weights {self._version!r}, not {version!r}")
        generated: Generated = self._running().call("generate", self.timeout, request=request)
        return generated

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop()
        self._child, self._version = None, None

    @property
    def pid(self) -> int | None:
        """The child's process id."""
        return None if self._child is None else self._child.process.pid

    def _running(self) -> Child:
        if self._child is None:
            raise EngineError("vLLM is not running: call start first")
        return self._child


def same_gpu(device: str) -> dict[str, str]:
    """The variable by which a child sees, of the GPUs that this process sees, the ``device`` alone."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else None
    return {"CUDA_VISIBLE_DEVICES": index or "0" if names is None else names[int(index or 0)]}


class Child:
    """The process, the connection to it, and a folder for what it reads."""

    def __init__(self, python: str, environment: dict[str, str], log: str | Path | None, bucket_bytes: int) -> None:
        folder = folder_for(bucket_bytes)
        self.folder = Path(folder.name)
        self.log = Path(tempfile.mkstemp(prefix="klq_vllm_", suffix=".log")[1] if log is None else log)
        ours, theirs = socket.socketpair()
        inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
        with theirs, self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [python, "-m", "klq_kernels.engines.vllm_worker", str(theirs.fileno())],
                env={**inherited, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # it and its workers are one group, which Ctrl-C does not reach
            )
        self.connection = Connection(ours.detach())
        self.stop = weakref.finalize(self, end, self.process, self.connection, folder)

    def call(self, method: str, timeout: float, **arguments: Any) -> Any:
        """What ``Served.method`` returns.

        Raises:
            EngineError: where it fails, takes longer than ``timeout`` seconds, or the process has ended.
        """
        try:
            until = time.monotonic() + timeout
            if not self._sent((method, arguments), until):
                raise self._too_slow(method, timeout)
            while not self.connection.poll(min(1.0, max(until - time.monotonic(), 0.0))):
                if self.process.poll() is not None and not self.connection.poll(0.0):
                    raise EOFError
                if time.monotonic() >= until:
                    raise self._too_slow(method, timeout)
            outcome, value = self.connection.recv()
        except (EOFError, OSError):
            raise EngineError(f"{self._how_it_ended()} during {method}. {RESUME}. {self._last_words()}") from None
        if outcome == "failed":
            raise EngineError(f"vLLM failed in {method}: {value}; its log is {self.log}")
        return value

    def _sent(self, message: Any, until: float) -> bool:
        """Sends a message; False where it is not read by the time ``until``, as more fits in no pipe."""
        failures: list[BaseException] = []

        def send() -> None:
            try:
                self.connection.send(message)
            except BaseException as failure:  # raised again by who waits
                failures.append(failure)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        sender.join(max(until - time.monotonic(), 0.0))
        if sender.is_alive():
            self.process.kill()  # its end closes, and the thread ends
            sender.join(5.0)
            return False
        if failures:
            raise failures[0]
        return True

    def _too_slow(self, method: str, timeout: float) -> EngineError:
        """Ends the process, whose answer would be of no more use, and says why."""
        self.process.kill()
        self.stop()
        return EngineError(
            f"vLLM took longer than {timeout:g} s for {method}, and was ended: allow more (engine_timeout), or ask for "
            f"fewer or shorter completions at once; its log is {self.log}. {RESUME}"
        )

    def _how_it_ended(self) -> str:
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:
            return "the process of vLLM closed its connection"
        if code < 0:
            return f"the process of vLLM was ended by {signal.Signals(-code).name}"
        return f"the process of vLLM ended with exit status {code}"

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-8:]
        return "\n  ".join([f"Its log {self.log} ends with:", *lines, ""]) if lines else f"Its log is {self.log}"


def end(process: subprocess.Popen[bytes], connection: Connection, folder: tempfile.TemporaryDirectory[str]) -> None:
    """Ends the process and what it has started: by the end of its connection, or else by force."""
    connection.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    folder.cleanup()
