"""Reads ``nvcc -Xptxas -v`` logs, writes one line per kernel, fails where a hot kernel spills.

Usage: cuda_resources.py HOT_KERNELS REPORT LOG...
HOT_KERNELS holds one regular expression a line, matched against demangled kernel names.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Kernel(NamedTuple):
    source: str
    architecture: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    name: str


def read_log(path: Path) -> list[Kernel]:
    kernels, entry, stack, spill = [], None, 0, 0
    for line in path.read_text().splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            entry = match.groups()
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line):
            stack, spill = map(int, match.groups())
        elif entry and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            shared_bytes = int(shared[1]) if shared else 0
            kernels.append(
                Kernel(path.stem, entry[1], int(match[1]), spill, stack, shared_bytes, demangle(entry[0]))
            )
            entry = None
    return kernels


def demangle(symbol: str) -> str:
    try:
        name = subprocess.run(["c++filt", "-p", symbol], capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return symbol
    return re.sub(r"\(anonymous namespace\)::|dynplan::kernels::|dynplan::", "", name)


def main() -> int:
    hot_file, report, *logs = map(Path, sys.argv[1:])
    kernels = sorted(
        (kernel for log in logs for kernel in read_log(log)), key=lambda k: (k.source, k.name, k.architecture)
    )
    rows = ["registers  spilled  stack  static-shared  arch    kernel"]
    rows += [
        f"{k.registers:9d}  {k.spill_bytes:7d}  {k.stack_bytes:5d}  {k.shared_bytes:13d}  "
        f"{k.architecture:6s}  {k.source}: {k.name}"
        for k in kernels
    ]
    report.write_text("\n".join(rows) + "\n")
    patterns = [line for line in hot_file.read_text().splitlines() if line and not line.startswith("#")]
    problems = []
    for pattern in patterns:
        hot = [k for k in kernels if re.search(pattern, k.name)]
        if not hot:
            problems.append(f"no kernel matches {pattern!r} of {hot_file}")
        problems += [
            f"{k.name} spills {k.spill_bytes} bytes on {k.architecture}" for k in hot if k.spill_bytes
        ]
    print(f"cuda-check: {len(kernels)} kernels, {len(patterns)} hot patterns, report in {report}")
    for problem in problems:
        print(f"cuda-check: {problem}", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
