"""Some sequences of the long proof; ``long_proof.py`` runs as many as are wanted."""

import warnings

import pytest
from integrations.long_proof import run_sequence
from integrations.proof_pair import Counts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("seed", range(12))
def test_sequence(seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = Counts()
        run_sequence(seed, counts)
    assert counts.operations
