"""A short run of the driver, the same inputs each time. A long one: `python -m python_tests.fuzz`."""

import ctypes
import faulthandler
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz.calls import CALLS
from fuzz.drive import drive
from fuzz.pages import Pages

from dynplan import _native

ROOT = Path(__file__).parents[2]
# Python's own; what they call is called here.
COMPOSED = {"planned_encoder", "swapped_forward", "swapped_plan"}


def test_every_function_is_called():
    names = {
        name.removeprefix("dynplan::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("dynplan::")
    }
    native = {f"_native.{name}" for name in dir(_native) if not name.startswith("__")}
    assert set(CALLS) == (names - COMPOSED) | native | {"WeightWatch"}


@pytest.mark.parametrize("at_end", [True, False])
def test_a_read_beyond_the_pages_ends_the_process(at_end):
    tensor = Pages().put(torch.arange(6.0).view(2, 3).t(), at_end)
    assert torch.equal(tensor, torch.arange(6.0).view(2, 3).t())
    child = os.fork()
    if not child:
        faulthandler.disable()  # its report would be of no use
        ctypes.string_at(tensor.data_ptr() + (6 * 4 if at_end else -1), 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) < 0


def test_findings_are_told(monkeypatch, capfd):
    """A crash and an error that names nobody, each with the way to have it again."""

    def complain():
        raise ValueError("no")

    monkeypatch.setitem(CALLS, "crash", (os.abort, lambda d: []))
    monkeypatch.setitem(CALLS, "complain", (complain, lambda d: []))
    counts, findings = drive(["pack", "crash", "complain"], seed=3, first=0, inputs=1, seconds=100)
    assert findings == [
        "signal SIGABRT: --seed 3 --only crash --first 0 --inputs 1",
        "an error, above: --seed 3 --only complain --first 0 --inputs 1",
    ]
    assert sum(counts.values()) == 1 and "no" in capfd.readouterr().err


def test_short_run():
    command = [sys.executable, "-m", "python_tests.fuzz", "--inputs", "20", "--seconds", "200"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"all +{20 * len(CALLS)} inputs, seed 1, 0 findings", done.stdout)
