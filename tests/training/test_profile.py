"""A trace of a few steps."""

import jax.numpy as jnp

from convnorm_jax.runs.profile import Profiler


def test_a_trace_is_written_once(tmp_path):
    profiler = Profiler(str(tmp_path), 2)
    said = [profiler.step_done(jnp.ones(4) * i) for i in range(8)]
    assert [i for i, folder in enumerate(said) if folder] == [4]  # three to warm up, then two
    assert profiler.close() is None
    assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


def test_a_run_that_ends_early_ends_the_trace(tmp_path):
    profiler = Profiler(str(tmp_path), 100)
    for i in range(4):
        assert profiler.step_done(jnp.ones(4) * i) is None
    assert profiler.close() == str(tmp_path / 'profile')
    assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


def test_no_steps_no_trace(tmp_path):
    profiler = Profiler(str(tmp_path), 0)
    assert not any(profiler.step_done(jnp.ones(4)) for _ in range(8))
    assert profiler.close() is None and not list(tmp_path.iterdir())
