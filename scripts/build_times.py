"""Compiles the extension anew in a folder of its own and prints how long it took, and the slowest files."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("csrc", "dynplan", "setup.py", "pyproject.toml", "version.txt", "README.md", "LICENSE")


def copy_sources(folder: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder)


def build(folder: Path, jobs: int) -> float:
    """Seconds of a build in place."""
    started = time.perf_counter()
    environment = os.environ | {"MAX_JOBS": str(jobs), "CCACHE_DISABLE": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def file_times(folder: Path) -> dict[str, float]:
    """Seconds of each compiled source, from ninja's logs."""
    times = {}
    for log in folder.glob("build/**/.ninja_log"):
        for line in log.read_text().splitlines()[1:]:
            begin, end, _, output, _ = line.split("\t")
            name = output.split("/csrc/", 1)[-1].removesuffix(".o")
            times[name] = (int(end) - int(begin)) / 1000
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--slowest", type=int, default=8, help="files to name")
    parser.add_argument(
        "--change",
        action="append",
        default=[],
        help="a source under csrc/: also say what building takes after a change of it",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        copy_sources(folder)
        print(f"from nothing, {options.jobs} jobs: {build(folder, options.jobs):.0f} s")
        for name, seconds in sorted(file_times(folder).items(), key=lambda row: -row[1])[: options.slowest]:
            print(f"  {seconds:5.1f} s  {name}")
        print(f"nothing changed: {build(folder, options.jobs):.0f} s")
        for name in options.change:
            with open(folder / "csrc" / name, "a") as source:
                source.write("// changed\n")
            print(f"{name} changed: {build(folder, options.jobs):.0f} s")


if __name__ == "__main__":
    main()
