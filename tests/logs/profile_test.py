"""Which steps of a run are traced."""

import jax
import pytest

from vitcls.logs.profile import Profile


@pytest.mark.parametrize(
    ("num_steps", "events"),
    [
        (0, []),
        (-1, []),
        (1, ["start before 2", "stop before 3"]),
        (2, ["start before 2", "stop before 4"]),
    ],
)
def test_the_steps_after_the_first_are_traced(num_steps, events, tmp_path, monkeypatch):
    """A run of 3 steps calls before each step and once after the last."""
    found = []
    profile = Profile(tmp_path, num_steps)
    for number in range(1, 5):
        monkeypatch.setattr(
            jax.profiler, "start_trace", lambda path, n=number: found.append(f"start before {n}")
        )
        monkeypatch.setattr(
            jax.profiler, "stop_trace", lambda n=number: found.append(f"stop before {n}")
        )
        profile.before(number, jax.numpy.zeros(()))
    assert found == events
