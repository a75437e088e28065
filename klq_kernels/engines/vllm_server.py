"""vLLM as a server: ``vllm serve`` on this machine or another, over HTTP.

The server is started by whoever runs it, with the part of this package that takes weights in it (docs/engines.md):

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs \\
        --worker-extension-cls klq_kernels.engines.vllm_worker.Extension \\
        --weight-transfer-config '{"backend": "klq_kernels"}'

Each completion is a request of its own, many at a time: /v1/completions has one seed for all prompts of a request. One
that gets no answer, or is told that the server is busy or broken, is sent again after a pause. Whether the server still
has the weights that it was given is asked after the last completion, so that one that has been restarted in between,
or given other weights, is found out before anything is learnt. Updates of the weights are not sent twice.
"""

from __future__ import annotations

import http.client
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import urlsplit

from torch import Tensor

from ..call.checks import require, require_number
from .protocol import RESUME, EngineError, Facts, Generated, Model, Request, WeightsLost, check_ends, sampling
from .weights import BUCKET_BYTES, buckets, folder_for, written

BUSY = (408, 425, 429, 500, 502, 503, 504)  # statuses after which to ask again
T = TypeVar("T")
COMMAND = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --worker-extension-cls "
    'klq_kernels.engines.vllm_worker.Extension --weight-transfer-config \'{"backend": "klq_kernels"}\''
)


class VLLMServer:
    """An ``Engine``: a running ``vllm serve``.

    Args:
        url: of the server, such as ``http://127.0.0.1:8000``.
        timeout: seconds to wait for one answer.
        retries: how often a completion is asked for again.
        pause: seconds before the first repetition; each further one waits twice as long.
        concurrency: completions that are asked for at a time.
        bucket_bytes: size of the files in which weights go over.
        folder: where these files are written; the server must see it under the same path. By default a new one in
            this machine's memory or temporary files, which serves where the server runs on the same machine.

    Raises:
        ValueError: where ``url`` is none.
    """

    shared = True

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 600.0,
        retries: int = 3,
        pause: float = 1.0,
        concurrency: int = 256,
        bucket_bytes: int = BUCKET_BYTES,
        folder: str | Path | None = None,
    ) -> None:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname)
        require(known, "url", f"must be the address of a server, such as http://127.0.0.1:8000; got {url!r}")
        require_number("timeout", timeout, positive=True)
        require_number("pause", pause, low=0.0)
        require(retries >= 0, "retries", f"must not be negative, got {retries}")
        require(concurrency >= 1, "concurrency", f"must be at least 1, got {concurrency}")
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.retries = retries
        self.pause = pause
        self.concurrency = concurrency
        self.bucket_bytes = bucket_bytes
        self.folder = folder
        self._own_folder: tempfile.TemporaryDirectory[str] | None = None
        self._name = ""

    def start(self, model: Model) -> Facts:
        """Asks the server what it serves.

        Raises:
            EngineError: where there is no server, or it was started without what updates of the weights need.
        """
        try:
            self._name = self._ask("GET", "/v1/models", again=self.retries)["data"][0]["id"]
            facts = self._ask("POST", "/collective_rpc", {"method": "klq_facts"})["results"][0]
            self._ask("POST", "/init_weight_transfer_engine", {"init_info": {}})
        except EngineError as error:
            raise EngineError(f"{error}. The server must have been started with: {COMMAND}") from None
        if facts["logprobs"] != "processed_logprobs":
            raise EngineError(
                f"{self.url} gives {facts['logprobs']}, not those of what it samples from: start it with {COMMAND}"
            )
        return Facts(facts["config"], facts["max_length"])

    def take_weights(self, weights: Iterable[tuple[str, Tensor]], version: str) -> None:
        if self.folder is None and self._own_folder is None:
            self._own_folder = folder_for(self.bucket_bytes)
        folder = Path(self._own_folder.name if self.folder is None else self.folder)  # type: ignore[union-attr]
        self._ask("POST", "/start_weight_update")
        for bucket in buckets(weights, self.bucket_bytes):
            with written(bucket, folder) as path:
                self._ask("POST", "/update_weights", {"update_info": {"path": str(path)}})
        self._ask("POST", "/finish_weight_update", {"weight_version": version})
        if not self._ask("POST", "/reset_prefix_cache")["success"]:
            raise EngineError(
                f"{self.url} still computes completions for others, and could not drop what it has cached under the "
                "old weights: a server that learns serves one run alone"
            )

    def generate(self, request: Request, version: str) -> Generated:
        shared = sampling(request) | {"model": self._name, "return_token_ids": True}
        bodies = [
            {**shared, "prompt": ids, "seed": seed} for ids, seed in zip(request.prompt_ids, request.seeds, strict=True)
        ]
        answers = in_threads(self._complete, bodies, self.concurrency)
        now = self._ask("GET", "/weight_info", again=self.retries)["weight_version"]
        if now != version:
            raise WeightsLost(f"{self.url} has the weights {now!r}, not {version!r}: was it restarted?")
        return Generated([ids for ids, _ in answers], [logprobs for _, logprobs in answers])

    def stop(self) -> None:
        """Forgets the server, which goes on."""
        if self._own_folder is not None:
            self._own_folder.cleanup()
            self._own_folder = None

    def _complete(self, body: dict[str, Any]) -> tuple[list[int], list[float]]:
        choice = self._ask("POST", "/v1/completions", body, again=self.retries)["choices"][0]
        check_ends({choice["finish_reason"]})
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None, *, again: int = 0) -> Any:
        """The answer to one request, as JSON; it is sent again up to ``again`` times."""
        problem = ""
        for attempt in range(again + 1):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                status, text = self._send(method, path, body)
            except TimeoutError:
                raise EngineError(
                    f"{self.url}{path} did not answer within {self.timeout:g} s: allow more (engine_timeout), ask for "
                    f"fewer or shorter completions at once, or see what the server is busy with. {RESUME}"
                ) from None
            except (OSError, http.client.HTTPException) as error:
                problem = f"cannot be reached ({type(error).__name__}: {error}): is the server running?"
                continue
            if status == 200:
                return json.loads(text)
            problem = f"answers {status}: {text[:500]}."
            if status not in BUSY:
                break
        raise EngineError(f"{self.url}{path} {problem} {RESUME}")

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, str]:
        """Status and text of an answer, over a connection of its own: servers close those that wait."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        with closing(kind(parts.netloc, timeout=self.timeout)) as connection:
            content = None if body is None else json.dumps(body)
            connection.request(method, parts.path + path, content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()


def in_threads(function: Callable[[dict[str, Any]], T], bodies: list[dict[str, Any]], most: int) -> list[T]:
    """``function`` of each of the bodies, ``most`` at a time; where one fails no other is begun, and that is raised.

    The threads are daemons: a program that is interrupted does not wait for their answers before it ends.
    """
    answers: dict[int, T] = {}
    errors: list[BaseException] = []
    left: Queue[tuple[int, dict[str, Any]]] = Queue()
    for numbered in enumerate(bodies):
        left.put(numbered)

    def work() -> None:
        with suppress(Empty):
            while not errors:
                at, body = left.get_nowait()
                try:
                    answers[at] = function(body)
                except BaseException as error:
                    errors.append(error)

    threads = [Thread(target=work, daemon=True) for _ in range(min(most, len(bodies)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [answers[at] for at in range(len(bodies))]
