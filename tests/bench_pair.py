"""A few benchmarks of `moecast bench`, as one of its children runs all: `bench_pair.py ARGUMENTS`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command with one size of everything."""
    from moecast import cli
    from moecast.measure import CHILD
    from trainer import bench

    bench.PRODUCTS, bench.STREAMS = bench.PRODUCTS[:1], bench.STREAMS[:1]
    bench.KINDS, bench.MESSAGES, bench.MORE_BETWEEN = ("all_to_all",), (2**14,), (2**16,)
    os.environ[CHILD] = str(os.getppid())
    sys.argv[0] = "moecast"
    cli.main()


if __name__ == "__main__":
    main()
