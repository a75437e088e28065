"""``python -m klq_kernels`` is ``klq``, for launchers of modules: ``accelerate launch -m klq_kernels train``."""

from __future__ import annotations

from .commands.cli import main

if __name__ == "__main__":
    main()
