"""The long run: ``python -m tests.fuzz --minutes 20``; ends with 1 if anything broke."""

import argparse
import sys
import time
import warnings
from itertools import cycle
from pathlib import Path

from tests.fuzz.run import Tally, run
from tests.fuzz.targets import TARGETS

BATCH = 100


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="first number")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    tally, number = Tally(), options.seed << 24
    names = [n for n in options.target or TARGETS for _ in range(TARGETS[n].weight)]
    options.keep.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    for name in cycle(names):
        if time.monotonic() >= end:
            break
        known = len(tally.broke)
        count = max(1, BATCH // TARGETS[name].cost)
        run(name, range(number, number + count), tally, options.keep)
        number += count
        for signature in list(tally.broke)[known:]:
            print(f"{signature} (number {tally.broke[signature][1]})", flush=True)
    for name, count in tally.tried.items():
        print(f"{name:<17} {count:>8,} inputs")
    print(f"{sum(tally.tried.values()):,} inputs, {len(tally.broke)} ways to break, "
          f"slowest {tally.seconds:.1f} s, first number {options.seed << 24}")  # fmt: skip
    sys.exit(bool(tally.broke))


if __name__ == "__main__":
    main()
