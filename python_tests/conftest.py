import pytest
import torch
from hypothesis import settings

# Deadlines would measure the machine, not us; derandomised, so that a failure is the same for everybody.
settings.register_profile("dynplan", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("dynplan")

torch.set_num_threads(2)


@pytest.fixture
def one_thread():
    """For tiny models, where a second thread costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
