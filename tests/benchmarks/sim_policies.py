"""Compare the scheduling policies on a simulated fleet: `python tests/benchmarks/sim_policies.py`.

`--write FILE` replaces that page by the new tables, `--quick` takes seconds in place of minutes.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.simulator.page import classed
from benchmarks.simulator.report import LOADS, all_runs, render
from benchmarks.simulator.runs import simulate

COMMAND = "python tests/benchmarks/sim_policies.py --write specs/SPEC-005-scheduling/results.md"


def main() -> None:
    """Run everything on all processors and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    seeds = range(1, (2 if options.quick else options.seeds) + 1)
    loads, seconds = ((0.3, 0.7), 900.0) if options.quick else (LOADS, 2400.0)
    runs = all_runs(seeds, loads, seconds)
    started = time.monotonic()
    with ProcessPoolExecutor(options.processes) as pool:
        results = dict(zip(runs, pool.map(simulate, runs), strict=True))
        page = render(results, list(pool.map(classed, seeds)), COMMAND)
    if options.write:
        options.write.write_text(page, encoding="utf-8")
    else:
        print(page)
    print(f"{len(runs)} runs in {time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
