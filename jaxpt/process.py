"""What is set once per process, before a command computes: memory pages, compiled programs, other processes."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

PAGES = "glibc.malloc.hugetlb"
TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_pages(environment: Mapping[str, str], pages: Path = TRANSPARENT) -> dict[str, str] | None:
    """Return the environment under which memory comes in huge pages, or None where nothing is to be changed.

    XLA asks for fresh memory at every step; on a CPU a third of a step can go into faulting it in page by page.
    glibc reads its tunables when a process starts, so the process must start anew. JAXPT_HUGE_PAGES=0 opts out,
    and a tunable that the user set stays.

    Args:
      environment: of this process.
      pages: what the kernel says about transparent huge pages.

    Example:
      >>> huge_pages({"JAXPT_HUGE_PAGES": "0"}) is None
      True
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    if environment.get("JAXPT_HUGE_PAGES") == "0" or PAGES in tunables or platform.libc_ver()[0] != "glibc":
        return None
    try:
        if "[never]" in pages.read_text():
            return None
    except OSError:  # no such kernel
        return None
    return {**environment, "GLIBC_TUNABLES": ":".join(filter(None, [tunables, f"{PAGES}=1"]))}


def restart_with_huge_pages() -> None:
    """Start this command anew, as the same process, where ``huge_pages`` asks for it."""
    environment = huge_pages(os.environ)
    if environment is not None:
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def keep_compiled_programs() -> None:
    """Keep compiled programs on disk, so that a resumed run does not compile again.

    They go to JAXPT_CACHE (~/.cache/jaxpt by default), per kind of CPU, since a program for one may not run on
    another. JAX_COMPILATION_CACHE_DIR names another folder, or none if it is empty.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    root = Path(os.environ.get("JAXPT_CACHE", "~/.cache/jaxpt")).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(root / f"compiled-{_cpu()}"))


def _cpu() -> str:
    """A short name of this kind of CPU: what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def calm_cpu() -> None:
    """On virtual CPU devices, run one program after the other; accelerators are not concerned.

    Programs with collectives that overlap on a few cores starve each other of threads until XLA gives up.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def join() -> None:
    """Join the other processes of the run, before any command touches a device.

    Raises:
      ValueError: they were not found.
    """
    import jax

    given = map(os.environ.get, ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    try:
        processes, index = (None if value is None else int(value) for value in given)
        jax.distributed.initialize(num_processes=processes, process_id=index)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed: the other processes were not found ({error}): start one process per host on a TPU pod, "
            f"SLURM, Kubernetes or Open MPI, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error
