"""Eight virtual CPU devices for every test, cheap compilation, and one compilation cache for the whole session."""

import gc
import itertools
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

# Tests compile far more than they compute: leave out most of the compiler's work. Set before the backend starts.
FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if jax.__version__.startswith("0.10."):  # half the time; later ones have no other emitters
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

CACHE = "JAXPT_TEST_CACHE"  # set by the first process, inherited by the workers of pytest-xdist
MAPS = 30_000  # mapped regions beyond which a worker forgets compiled programs; Linux allows 65,530
EVERY = 10  # tests between two looks
FINISHED = itertools.count(1)

jax.config.update("jax_num_cpu_devices", 8)
# Programs with collectives that overlap on a few cores can starve each other of threads.
jax.config.update("jax_cpu_enable_async_dispatch", False)


def pytest_configure(config: pytest.Config) -> None:
    """Share compiled programs among tests and workers; nothing is left behind."""
    if CACHE not in os.environ:
        folder = tempfile.mkdtemp(prefix="jaxpt-test-cache-")
        os.environ[CACHE] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_runtest_teardown() -> None:
    """Keep a worker small: every compiled program maps several regions and keeps memory, and files share few."""
    maps = Path("/proc/self/maps")
    if next(FINISHED) % EVERY == 0 and maps.exists() and maps.read_text().count("\n") > MAPS:
        jax.clear_caches()
        gc.collect()
