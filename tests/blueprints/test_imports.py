"""A service that only stores blueprints must not need torch."""

import subprocess
import sys

SCRIPT = """
import sys
import esper.blueprints as blueprints
import esper.blueprints.digest
import esper.blueprints.kernels
blueprint = blueprints.get("bottleneck")
blueprints.check(blueprint)
assert len(blueprints.blueprint_digest(blueprint)) == 64
assert "torch" not in sys.modules, "torch was imported"
"""


def test_digest_and_checker_work_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
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
