"""python -m python_tests.fuzz [--seconds S] [--seed N] [--only NAME] [--first I] [--inputs N]"""

import argparse
import sys

from .calls import CALLS
from .drive import drive


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m python_tests.fuzz", description="Fuzzes ops and _native."
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=list(CALLS), help="one function alone")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--inputs", type=int, default=1 << 40, help="of each function, at most")
    given = parser.parse_args()
    names = [given.only] if given.only else list(CALLS)
    counts, findings = drive(names, given.seed, given.first, given.inputs, given.seconds)
    for name in names:
        print(f"{name:42} {counts[name, 'ran']:9} ran {counts[name, 'refused']:9} refused")
    print(f"{'all':42} {sum(counts.values()):9} inputs, seed {given.seed}, {len(findings)} findings")
    for finding in findings:
        print(finding)
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
