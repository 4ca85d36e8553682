"""The import guard, the build facts and what importing costs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import esper
from esper import _C
from esper import _build

ROOT = Path(_build.__file__).resolve().parent
REMEDY = "run `make setup`, or `pip install -e . --no-build-isolation` in this environment."


def test_build_info():
    info = esper.build_info()
    assert info.torch_version == torch.__version__
    assert info.cuda == bool(info.cuda_archs)
    assert info.cpu_capability in ("portable", "avx2", "avx512")
    assert info.compiler
    with pytest.raises(AttributeError):
        info.compiler = "other"


def test_the_version_is_read_without_loading(tmp_path):
    assert _build.recorded_torch(Path(_C.__file__)) == torch.__version__
    other = tmp_path / "empty.so"
    other.write_bytes(b"nothing here")
    assert _build.recorded_torch(other) is None


def python(code: str, package: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=package.parent,
        env={**os.environ, "PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the package that can be broken."""
    target = tmp_path / "esper"
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def import_error(package: Path, statement: str = "import esper") -> str:
    # The finder of an editable install would supply what is missing in the copy.
    code = f"""
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
{statement}
"""
    result = python(code, package)
    assert result.returncode == 1
    return result.stderr.strip().splitlines()[-1]


def test_a_missing_core_says_what_to_run(package):
    for library in package.glob("_C*.so"):
        library.unlink()
    assert import_error(package) == f"ImportError: esper's native core is not built: {REMEDY}"


def test_a_core_for_another_torch_says_what_to_run(package):
    (library,) = package.glob("_C*.so")
    marker = b"esper-built-against-torch="
    data = library.read_bytes()
    major = torch.__version__.partition(".")[0].encode()
    library.write_bytes(data.replace(marker + major, marker + b"1"))
    other = "1." + torch.__version__.partition(".")[2]
    assert import_error(package) == (
        f"ImportError: esper's native core was built against torch {other} but torch "
        f"{torch.__version__} is installed: {REMEDY}"
    )


def test_a_damaged_core_says_what_to_run(package):
    (library,) = package.glob("_C*.so")
    # The whole file is torn but for the marker.
    marker = f"esper-built-against-torch={torch.__version__};"
    library.write_bytes(b"\0" * 4096 + marker.encode())
    for statement in ("import esper.kasmina", "import esper; esper.build_info()"):
        message = import_error(package, statement)
        assert message.startswith("ImportError: esper's native core does not load (")
        assert message.endswith(REMEDY)


def test_a_local_build_of_the_same_torch_is_accepted():
    running = torch.__version__.partition("+")[0]
    _build.check_library(Path(_C.__file__), running + "+cu130")
    with pytest.raises(ImportError):
        _build.check_library(Path(_C.__file__), running + ".1")


@pytest.mark.parametrize(
    ("module", "others"),
    [
        ("esper", {"grpc", "lmdb", "google.protobuf"}),
        ("esper.cli.main", {"grpc", "lmdb", "google.protobuf"}),
        ("esper.cli.urza", {"lmdb"}),
        ("esper.services.urza.offline", set()),
        ("esper.services.urza.service", set()),
        ("esper.services.oona.service", set()),
    ],
)
def test_import_is_light(module, others):
    code = f"""
import sys, threading
import {module}
print(*(set({sorted(others)!r}) | {{"torch", "numpy", "sklearn", "matplotlib"}}) & set(sys.modules))
assert threading.active_count() == 1
"""
    result = python(code, ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_services_are_part_of_the_package(tmp_path):
    code = "import esper.services, esper; print(esper.services.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).parent.name == "services"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ESPER_CUDA": "yes"}, "esper: ESPER_CUDA is 'yes' but must be `auto`, `0` or `1`."),
        ({"CXX": "/no/such/compiler"}, "esper: the C++ compiler '/no/such/compiler' is not there"),
    ],
)
def test_wrong_build_settings_give_one_sentence(environment, message):
    result = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext"],
        cwd=ROOT.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith(message)
