"""Progress: silent unless asked for."""

import threading

import pytest
import torch

import apportion as ap
from apportion.core.progress import tick


def long_work() -> ap.Attribution:
    field = ap.Field(lambda x: (x**2).sum(1), batch_size=4)
    return ap.IntegratedGradients(quadrature=ap.quadrature.Gauss(5))(field, torch.randn(3, 2))


def test_silent_by_default(capfd: pytest.CaptureFixture[str]) -> None:
    long_work()
    ap.SmoothGrad(samples=9)(ap.Field(lambda x: x.sum(1)), torch.randn(3, 2))
    assert capfd.readouterr() == ("", "")


def test_rows_are_reported_in_order() -> None:
    seen: list[tuple[str, int, int]] = []
    with ap.progress(lambda what, done, total: seen.append((what, done, total))):
        long_work()
    assert seen == [("baselines", 3, 3)] + [("path", n, 15) for n in (4, 8, 12, 15)]
    long_work()
    assert len(seen) == 5


def test_inner_blocks_and_exceptions_give_the_listener_back() -> None:
    outer: list[int] = []
    inner: list[int] = []

    def fail() -> None:
        with ap.progress(lambda what, done, total: inner.append(done)):
            tick("a", 1, 2)
            raise ZeroDivisionError

    with ap.progress(lambda what, done, total: outer.append(done)):
        with pytest.raises(ZeroDivisionError):
            fail()
        tick("b", 2, 2)
    tick("c", 3, 3)
    assert (outer, inner) == ([2], [1])


def test_other_threads_are_not_listened_to() -> None:
    seen: list[int] = []
    with ap.progress(lambda what, done, total: seen.append(done)):
        thread = threading.Thread(target=lambda: tick("a", 1, 1))
        thread.start()
        thread.join()
    assert seen == []


def test_a_line_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    with ap.progress():
        for done in range(1, 1001):
            tick("work", done, 1000)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("\rwork: ")
    assert err.endswith("s\n")
    assert "1000/1000 rows" in err
    assert err.count("\r") < 20
