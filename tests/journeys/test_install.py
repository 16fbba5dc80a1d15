"""The wheel holds everything: commands work from any folder, with nothing of the checkout in reach."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .conftest import SMALL

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_symlink():
                (source / name).symlink_to((ROOT / name).readlink())
            else:
                (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(source)], check=True, capture_output=True, timeout=300)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_every_config(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "mathverify").rglob("*.py")}
    configs = {f"mathverify/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    weights = {str(path.relative_to(ROOT)) for path in (ROOT / "mathverify/tiny/checkpoint").iterdir()}
    assert modules | configs | weights <= names


@pytest.mark.slow
def test_the_installed_command_works_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work here"
    work.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    where = "import mathverify, mathverify.entry as e; print(mathverify.__file__); print(e.config_dir())"
    found = subprocess.run([sys.executable, "-c", where], cwd=work, env=environment, capture_output=True, text=True)
    assert all(line.startswith(str(site)) for line in found.stdout.split())
    done = subprocess.run(
        [sys.executable, "-m", "mathverify.train", *SMALL, f"data.cache_dir='{tmp_path}/cache'", "hydra.run.dir=out"],
        cwd=work, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (work / "out" / "result.json").is_file()
