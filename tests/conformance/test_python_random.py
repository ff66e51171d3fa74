"""Python's own random state, in a process without the run-time type checker, which draws from it."""

import subprocess
import sys

SCRIPT = """
import random
import torch
import apportion as ap
from apportion import planted

{draw}
before = random.getstate()
x = torch.ones(2, 2, 8, 8, dtype=torch.float64)
field = ap.Field(planted.conv_net())
data = torch.rand(32, *x.shape[1:], dtype=x.dtype)
for name, card in ap.methods().items():
    if ap.Need.VECTORS in card.needs or ap.Need.LOSS in card.needs:
        continue
    ap.method(name)().fitted(field, data)(field, x, target=0)
    {inside}
assert random.getstate() == before, "changed"
"""


def _run(inside: str) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(draw="random.seed(0)", inside=inside)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_python_random_state_is_left_alone() -> None:
    done = _run("pass")
    assert done.returncode == 0, done.stderr


def test_a_method_that_draws_would_be_noticed() -> None:
    assert "changed" in _run("random.random()").stderr
