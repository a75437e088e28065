"""``vllm serve`` in small: python fake_server.py FOLDER_OF_THE_MODEL; prints its port.

It serves the routes that ``VLLMServer`` calls, from the stand-in for vLLM. POST /fault makes trouble: {"busy": 2}
answers 503 to so many of the next requests for completions, {"slow": 1.5} makes each take so many seconds, {"broken":
true} breaks completions off, {"restart": true} gives up all weights that it was given, {"mode": "raw_logprobs"} does so
too, with that option.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig

from klq_kernels.engines.vllm_worker import BACKEND, EXTENSION

SAMPLING = set(SamplingParams.__dataclass_fields__)


class State:
    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.lock = threading.Lock()
        self.busy, self.slow, self.broken = 0, 0.0, False
        self.start()

    def start(self, mode: str = "processed_logprobs") -> None:
        transfer = WeightTransferConfig(BACKEND)
        self.llm = LLM(self.folder, "float32", EXTENSION, transfer, logprobs_mode=mode, max_model_len=64)

    def answer(self, route: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        llm = self.llm
        if route == "/fault":
            self.busy, self.slow = body.get("busy", 0), body.get("slow", 0.0)
            self.broken = body.get("broken", False)
            if body.get("restart") or "mode" in body:
                self.start(body.get("mode", "processed_logprobs"))
        elif route == "/v1/models":
            return 200, {"data": [{"id": "tiny"}]}
        elif route == "/collective_rpc":
            return 200, {"results": llm.collective_rpc(body["method"])}
        elif route == "/weight_info":
            return 200, {"weight_version": llm.get_weight_version()}
        elif route == "/reset_prefix_cache":
            return 200, {"success": llm.reset_prefix_cache()}
        elif route == "/init_weight_transfer_engine":
            llm.init_weight_transfer_engine(body)
        elif route == "/start_weight_update":
            llm.start_weight_update()
        elif route == "/update_weights":
            llm.update_weights(body)
        elif route == "/finish_weight_update":
            llm.finish_weight_update(body["weight_version"])
        elif route == "/v1/completions":
            return self.complete(body)
        else:
            return 404, {"detail": "Not Found"}
        return 200, {}

    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        time.sleep(self.slow)
        if self.busy:
            self.busy -= 1
            return 503, {"error": "busy"}
        if body["model"] != "tiny":
            return 404, {"error": "no such model"}
        parameters = SamplingParams(**{name: value for name, value in body.items() if name in SAMPLING})
        with self.lock:
            output = self.llm.generate([{"prompt_token_ids": body["prompt"]}], [parameters])[0].outputs[0]
        logprobs = [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)]
        choice = {"token_ids": output.token_ids, "logprobs": {"token_logprobs": logprobs}}
        return 200, {"choices": [choice | {"finish_reason": "abort" if self.broken else output.finish_reason}]}


class Handler(BaseHTTPRequestHandler):
    state: State

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            status, answer = self.state.answer(self.path, json.loads(content or b"{}"))
        except Exception as error:
            status, answer = 500, {"error": repr(error)}
        text = json.dumps(answer).encode()
        with suppress(ConnectionError):  # of those who did not wait
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    Handler.state = State(*sys.argv[1:])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
