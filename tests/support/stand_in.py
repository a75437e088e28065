"""A stand-in for vLLM where a child process or a server would import it: their environment, and the server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
STAND_IN = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, SUPPORT, SUPPORT / "fake_vllm"))), "OMP_NUM_THREADS": "1"}


class Server:
    """A server in a process of its own."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, str(SUPPORT / "fake_server.py"), str(folder)]
        self.process = subprocess.Popen(command, env={**os.environ, **STAND_IN}, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def fault(self, **what: Any) -> None:
        """Makes trouble; without arguments, no more."""
        request = urllib.request.Request(f"{self.url}/fault", json.dumps(what).encode(), method="POST")
        urllib.request.urlopen(request).close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
