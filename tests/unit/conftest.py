"""What several unit tests share."""

from collections.abc import Iterator

import jaxtyping
import pytest


@pytest.fixture
def as_users_run() -> Iterator[None]:
    """Switch the type checks of annotations off, as outside the tests, so that our own errors show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
