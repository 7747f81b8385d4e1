"""region_cross_entropy's precision on the instruction sets that this CPU would not take by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynplan import _native

ORDER = ["baseline", "avx2", "avx512"]
BEST = _native.cpu_features()["best_isa"]
HERE = Path(__file__).parent


@pytest.mark.parametrize("isa", [isa for isa in ORDER if ORDER.index(isa) < ORDER.index(BEST)])
def test_precision_of_narrower_instruction_sets(isa):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(HERE / "test_region_cross_entropy_maths.py")],
        cwd=HERE.parents[1],
        env=os.environ | {"DYNPLAN_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
