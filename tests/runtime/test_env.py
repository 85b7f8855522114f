import re

import pytest

from qnext.runtime.env import cpu_info, env_int, git_revision, num_usable_cores, package_version


def test_versions_are_read_without_importing_the_package():
    assert re.match(r"\d+\.\d+", package_version("torch") or "")
    assert package_version("no-such-package-as-this") is None


def test_the_cpu_has_a_name_and_at_least_one_core():
    cpu = cpu_info()
    assert cpu.name
    assert cpu.num_cores == num_usable_cores() >= 1


def test_an_integer_variable_is_read_or_refused_by_name(monkeypatch):
    monkeypatch.delenv("QNEXT_TEST_COUNT", raising=False)
    assert env_int("QNEXT_TEST_COUNT", 3) == 3
    monkeypatch.setenv("QNEXT_TEST_COUNT", " 12 ")
    assert env_int("QNEXT_TEST_COUNT", 3) == 12
    monkeypatch.setenv("QNEXT_TEST_COUNT", "many")
    with pytest.raises(ValueError, match=r"QNEXT_TEST_COUNT is 'many'"):
        env_int("QNEXT_TEST_COUNT", 3)


def test_a_folder_outside_git_has_no_revision(tmp_path):
    assert git_revision(tmp_path) is None
