"""region_cross_entropy's precision on the instruction sets that this CPU would not take by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import INSTRUCTION_SETS

HERE = Path(__file__).parent


@pytest.mark.parametrize("isa", INSTRUCTION_SETS[:-1])
def test_precision_of_narrower_instruction_sets(isa):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(HERE / "test_region_cross_entropy_maths.py")],
        cwd=HERE.parents[1],
        env=os.environ | {"DYNPLAN_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
