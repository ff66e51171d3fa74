"""One thread a worker: two workers share the machine's cores."""

import gc

import pytest
import shape_checks
import torch

shape_checks.use()  # before anything imports the library
torch.set_num_threads(1)
torch.manual_seed(0)  # every worker collects the same random parameters


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """What is there before the tests stays until their end: the garbage collector need not look through it."""
    gc.collect()
    gc.freeze()
