"""Eight CPU devices, a cache of programs, strict switches, ways to run a function."""

import gc
import os
import pathlib

import jax
import pytest
import remedies

jax.config.update("jax_num_cpu_devices", 8)
remedies.install()

# Most of the time goes into compiling, and many tests compile the same: the first one
# does. JAX looks programs up by their text, their options and its own version.
CACHE = pathlib.Path(__file__).parents[1] / "build" / "xla"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

SWITCHES = {
    "x64": ("jax_enable_x64", True),
    "dtype": ("jax_numpy_dtype_promotion", "strict"),
    "rank": ("jax_numpy_rank_promotion", "raise"),
    "checks": ("jax_enable_checks", True),
    "leaks": ("jax_check_tracer_leaks", True),
}
for switch in os.environ.get("STOPGRAD_STRICT", "").split():
    jax.config.update(*SWITCHES[switch])
# Switches of JAX that are to be turned over one day: "jax_remat3 jax_custom_vjp3".
for switch in os.environ.get("STOPGRAD_SWITCH", "").split():
    jax.config.update(switch, not getattr(jax.config, switch))

# Programs in these keep traced values where leak checking looks for them: in the
# attributes of models, in lists and in closures of the tests.
KEEPING = [
    *("test_flow_labels.py", "test_flow_soundness.py", "test_flow_zoo.py"),
    *("test_references.py", "test_rules.py", "test_closures.py"),
    *("test_flow_found.py", "test_var_folds.py", "test_var_watched.py"),
    *("test_edited_again.py", "test_var_attributes.py"),
]
# The estimators are compositions of what is checked for leaks; their statistics and
# compiled programs would take half an hour more with it.
COMPOSED = [
    *("test_codebook.py", "test_codebook_cost.py", "test_estimators.py"),
    *("test_fsq.py", "test_nearest.py", "test_quantize.py", "test_score.py"),
    *("test_quantize_borders.py", "test_quantize_recipes.py", "test_undrawable.py"),
    *("test_sample.py", "test_sample_means.py", "test_surrogate.py"),
    *("test_sample_claims.py", "test_score_variance.py"),
    *("test_train.py", "test_train_devices.py", "test_train_processes.py"),
    *("test_train_cost.py", "test_fit.py", "test_nonfinite.py", "test_check.py"),
    "test_check_refused.py",
]
collect_ignore = [*KEEPING, *COMPOSED] if jax.config.jax_check_tracer_leaks else []


def pytest_collection_finish():
    """Leave what is imported out of every later search for garbage or for leaks."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["eager", "jit"])
def run(request):
    """Call a function as it is, or jitted."""
    return jax.jit if request.param == "jit" else lambda fun: fun


@pytest.fixture
def standard_promotion():
    """Let optax and flax promote: they do not pass with strict promotion themselves."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def usual_settings():
    """Set JAX as most users have it, for losses whose printed text is tested."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.enable_x64(False),
    ):
        yield
