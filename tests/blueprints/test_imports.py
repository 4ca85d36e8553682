"""A service that only stores blueprints must not need torch."""

import subprocess
import sys
from pathlib import Path

import esper

SCRIPT = """
import sys, types
package = types.ModuleType("esper")  # in place of esper/__init__.py, which loads the native core
package.__path__ = [sys.argv[1]]
sys.modules["esper"] = package
import esper.blueprints as blueprints
import esper.blueprints.digest
import esper.blueprints.kernels
blueprint = blueprints.get("bottleneck")
blueprints.check(blueprint)
assert len(blueprints.blueprint_digest(blueprint)) == 64
assert "torch" not in sys.modules, "torch was imported"
"""


def test_digest_and_checker_work_without_torch() -> None:
    root = Path(esper.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_needs_torch_is_there_on_first_use() -> None:
    import esper.blueprints as blueprints

    for name in blueprints.__all__:
        assert getattr(blueprints, name) is not None
    try:
        blueprints.unheard_of  # type: ignore[attr-defined]  # noqa: B018
    except AttributeError as error:
        assert "unheard_of" in str(error)
    else:
        raise AssertionError("an unknown name was found")
