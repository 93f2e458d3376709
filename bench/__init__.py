"""Benchmarks of fastis: ``bench_*.py`` and ``gpu_*.py`` time pieces, ``experiments/`` trains."""
