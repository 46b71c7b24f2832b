"""The description of machine and project in a report."""

import platform
import shutil
import subprocess

import numpy as np
import pytest

from model import environment


def git(folder, *arguments):
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A stand-in for the project's folder, and a repository around it with another commit."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "outer" / "project"
    folder.mkdir(parents=True)
    (folder / "file").write_text("text")
    git(tmp_path / "outer", "init")
    git(tmp_path / "outer", "add", ".")
    git(tmp_path / "outer", "commit", "-m", "another project")
    monkeypatch.setattr(environment, "ROOT", folder)
    return folder


def test_the_folder_whose_commit_is_reported_is_the_projects():
    assert (environment.ROOT / "model" / "environment.py").samefile(environment.__file__)


def test_the_commit_of_an_enclosing_repository_is_not_reported(project):
    assert environment.environment().commit is None


def test_accelerate_is_reported(monkeypatch):
    """Not the BLAS that SciPy or PyTorch has loaded: threadpoolctl cannot see Accelerate."""
    monkeypatch.setattr(np, "show_config", lambda mode: {"Build Dependencies": {"blas": {"name": "accelerate"}}})
    assert environment.environment().blas == [f"Accelerate {platform.mac_ver()[0]}".strip()]


def test_the_projects_own_commit(project, monkeypatch):
    git(project, "init")
    git(project, "add", ".")
    git(project, "commit", "-m", "ours")
    own = environment.environment().commit
    assert own
    assert not own.endswith("-dirty")
    monkeypatch.setenv("GIT_DIR", str(project.parent / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(project.parent))
    assert environment.environment().commit == own
    (project / "file").write_text("changed")
    assert environment.environment().commit == f"{own}-dirty"
