"""The wheel: one namespace, with weights and head scores inside, usable from anywhere."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = """
import kvzip
model = kvzip.ModelKVzip()
kv = model.prefill("My name is Ada Moreno. I live in Lisbon. The red box holds 4417.")
kv.prune(0.5)
print(kvzip.__file__)
print(model.generate("Where do I live?", kv=kv, max_new_tokens=8))
"""


@pytest.mark.slow
def test_wheel_installs_one_namespace_that_works_alone(tmp_path):
    source = tmp_path / "source"  # a build leaves folders behind
    shutil.copytree(ROOT / "kvzip", source / "kvzip", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("kvzip-*.whl")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"kvzip"}
    assert "kvzip/model/bundled/model.safetensors" in names
    assert "kvzip/head_scores/files/bundled.json" in names
    assert "kvzip/py.typed" in names
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=elsewhere, env=environment, check=True, capture_output=True, text=True
    )
    where, answer = done.stdout.strip().splitlines()
    assert where.startswith(str(site))
    assert "Lisbon" in answer
