"""Writes the subset of Fashion-MNIST that the benchmarks carry: 1,000 training and 200 test images
of each class, drawn by a fixed seed and kept in the order of the whole set.

    python bench/experiments/make_subset.py fashion_mnist.npz
"""

import argparse
from pathlib import Path

import numpy as np

SUBSET = Path(__file__).parents[1] / "data" / "fashion_mnist_subset.npz"
PER_CLASS = {"train": 1000, "test": 200}
SEED = 2017


def stratified(labels: np.ndarray, per_class: int, generator: np.random.Generator) -> np.ndarray:
    """Sorted positions of ``per_class`` random entries of every class, without repetition."""
    chosen = [
        generator.choice(np.flatnonzero(labels == label), per_class, replace=False)
        for label in np.unique(labels)
    ]
    return np.sort(np.concatenate(chosen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("whole", type=Path, help=".npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--out", type=Path, default=SUBSET)
    args = parser.parse_args()

    generator = np.random.default_rng(SEED)
    subset = {}
    with np.load(args.whole) as whole:
        for part, per_class in PER_CLASS.items():
            rows = stratified(whole[f"y_{part}"], per_class, generator)
            subset[f"x_{part}"] = whole[f"x_{part}"][rows]
            subset[f"y_{part}"] = whole[f"y_{part}"][rows]
    np.savez_compressed(args.out, **subset)
    print(f"{args.out.name}: {args.out.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
