"""Benchmarks of fastis. ``train.py`` is the main job; ``bench_*.py`` time single pieces."""
