"""Benchmarks: contenders side by side on one set of inputs, checked against float64 before they are timed.

    python -m bench loss --preset quick         one task; see ``cli`` (``klq bench`` is the same)
    python -m bench.readme_numbers              the figures of the README
    python -m bench.gpu_suite                   everything worth measuring on a GPU, in one command
    python -m bench.page                        writes docs/benchmarks.md from bench/results/*.json
    pytest bench --benchmark-only               micro-benchmarks of single kernels

``inputs`` makes realistic inputs, ``contenders`` holds one small adapter per implementation, ``tasks`` says what is
computed and what a right answer is, ``harness`` measures, ``report`` turns measurements into tables, plots and files.
"""
