"""Runs the steps of one package on one cell, as it is told on its input.

    python child.py <module with make_step> <index of the cell>

A number on a line of input is how many steps to take: their seconds and the
last loss are put out, in JSON. At the end of the input, peak memory is.
"""

import importlib
import json
import os
import resource
import sys
import time

from cells import CELLS


def main(name, index):
    """See above."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print is not ours
    start = time.perf_counter()
    step = importlib.import_module(name).make_step(CELLS[int(index)])
    made = time.perf_counter()
    loss = step()
    first = time.perf_counter() - made
    print(
        json.dumps({"import_s": made - start, "first_s": first, "loss": loss}),
        file=out,
        flush=True,
    )
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - start)
        found = {"seconds": seconds, "loss": loss}
        print(json.dumps(found), file=out, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_mib": peak}), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
