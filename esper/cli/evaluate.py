"""`esper evaluate`: the test accuracy of a saved model, in a fresh process."""

import json
from pathlib import Path

import click

from esper import artifacts
from esper.tolaria import tasks


@click.command(name="evaluate")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of a line.")
def command(folder: Path, as_json: bool) -> None:
    """Print the test accuracy of the model in FOLDER.

    FOLDER was written by `esper demo` or `esper.save`. The model must belong to a named task: its
    host is built anew, the grafts are put in, and the task's test data is read once. The number is
    the same, bit for bit, as in report.json.
    """
    name = artifacts.read_architecture(folder).task
    if name is None:
        raise click.ClickException(
            f"{folder} names no task, so there is no test data for it; load it with esper.load"
        )
    task = tasks.get(name)
    model = artifacts.load(folder, task.host())
    accuracy = task.accuracy(model, task.test)
    if as_json:
        result = {
            "task": task.name,
            "test_accuracy": accuracy,
            "num_samples": len(task.test),
            "parameters": model.num_parameters(),
        }
        click.echo(json.dumps(result))
    else:
        click.echo(f"test_accuracy {accuracy!r}")
