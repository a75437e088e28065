"""``klq`` in a process that passes for one with a GPU (``gloo_launch``): python posed_klq.py ARGUMENTS of klq."""

from __future__ import annotations

import sys

from gloo_launch import pose_as_accelerators

pose_as_accelerators()

from klq_kernels.commands.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
