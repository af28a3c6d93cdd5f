"""Eight virtual CPU devices for every test, before any backend starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def shared_tmp(tmp_path_factory: pytest.TempPathFactory):
    """A folder that lives as long as the session (one per xdist worker)."""
    return tmp_path_factory.mktemp("shared")
