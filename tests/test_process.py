"""What the command line sets per process: seen from outside, in real processes."""

import os
import subprocess
import sys

import jax
import pytest

from jaxpt import process

PRINT = (
    "import os; from jaxpt import process; process.restart_with_huge_pages();"
    "print(os.getpid(), os.environ.get('GLIBC_TUNABLES'))"
)


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.38"))
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    return tmp_path / "enabled"


def test_huge_pages_are_asked_for_once(kernel):
    wanted = process.huge_pages({"A": "b"}, kernel)
    assert wanted == {"A": "b", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    assert process.huge_pages(wanted, kernel) is None


def test_huge_pages_leave_the_users_settings_alone(kernel):
    assert process.huge_pages({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=2"}, kernel) is None
    assert process.huge_pages({"JAXPT_HUGE_PAGES": "0"}, kernel) is None
    more = process.huge_pages({"GLIBC_TUNABLES": "glibc.malloc.check=3"}, kernel)
    assert more == {"GLIBC_TUNABLES": "glibc.malloc.check=3:glibc.malloc.hugetlb=1"}


def test_huge_pages_need_a_kernel_and_a_libc_that_have_them(kernel, monkeypatch):
    assert process.huge_pages({}, kernel.parent / "absent") is None
    kernel.write_text("always madvise [never]\n")
    assert process.huge_pages({}, kernel) is None
    kernel.write_text("[always] madvise never\n")
    assert process.huge_pages({}, kernel) is not None
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert process.huge_pages({}, kernel) is None


@pytest.mark.skipif(process.huge_pages({}) is None, reason="this machine has no huge pages")
def test_a_process_starts_anew_as_itself():
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    child = subprocess.Popen([sys.executable, "-c", PRINT], env=environment, stdout=subprocess.PIPE, text=True)
    assert child.communicate()[0].split() == [str(child.pid), "glibc.malloc.hugetlb=1"]


def test_programs_are_kept_where_the_user_says(tmp_path):
    code = "import jax; from jaxpt import process; process.keep_compiled_programs();"
    code += "print(jax.config.jax_compilation_cache_dir)"

    def folder(**given):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
        return subprocess.check_output([sys.executable, "-c", code], env=environment | given, text=True).strip()

    assert folder(JAXPT_CACHE=str(tmp_path)).startswith(str(tmp_path / "compiled-"))
    assert folder(JAXPT_CACHE=str(tmp_path), JAX_COMPILATION_CACHE_DIR="") in ("", "None")


def test_a_cache_that_is_set_stays():
    before = jax.config.jax_compilation_cache_dir  # of the test session
    process.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == before
