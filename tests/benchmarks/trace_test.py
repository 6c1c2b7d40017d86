"""Gaps between executions, from traces of programs that wait in between or do not."""

import time

import jax
import jax.numpy as jnp

from benchmarks.trace import gap_share


def test_gaps_are_what_passes_between_executions(tmp_path):
    @jax.jit
    def product(x):
        return (x @ x) / x.shape[0]

    x = jax.block_until_ready(product(jnp.ones((512, 512))))
    secs = {}
    for pause in (0.0, 0.05):
        with jax.profiler.trace(tmp_path / str(pause)):
            begin = time.perf_counter()
            for _ in range(5):
                x = jax.block_until_ready(product(x))
                time.sleep(pause)
            secs[pause] = time.perf_counter() - begin - pause  # the last pause is after the end
    shares = {pause: gap_share(tmp_path / str(pause), "jit_product") for pause in secs}
    assert 0 <= shares[0.0] < shares[0.05] < 1
    assert shares[0.05] >= 4 * 0.05 / secs[0.05]


def test_a_trace_without_the_program_has_no_gaps(tmp_path):
    with jax.profiler.trace(tmp_path):
        jax.block_until_ready(jnp.ones(3) + 1)
    assert gap_share(tmp_path, "jit_product") is None
