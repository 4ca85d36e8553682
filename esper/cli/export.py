"""`esper export`: the finished model of a run for use without Esper."""

from pathlib import Path

import click
import safetensors.torch
import torch

from esper import artifacts
from esper.tolaria.runs.folder import RunFolder
from esper.tolaria.runs.model import load_model

SUFFIXES = {"safetensors": ".safetensors", "pt2": ".pt2", "onnx": ".onnx"}


@click.command(name="export")
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--format", "form", type=click.Choice(list(SUFFIXES)), default="safetensors", show_default=True
)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Default: model.* in RUN."
)
def command(folder: Path, form: str, out: Path | None) -> None:
    """Export the finished model of the run in the folder RUN.

    The grafts become part of a plain torch module first. safetensors holds its weights; pt2 (a
    torch.export program) and onnx hold the whole model, for any number of samples.
    """
    grown, task = load_model(RunFolder(folder))
    model = artifacts.harden(grown).eval()
    out = folder / f"model{SUFFIXES[form]}" if out is None else out
    example = (task.validation.inputs[:2],)
    batch = torch.export.Dim("batch")
    if form == "safetensors":
        safetensors.torch.save_model(model, str(out))
    elif form == "pt2":
        program = torch.export.export(model, example, dynamic_shapes=({0: batch},))
        torch.export.save(program, out)
    else:
        _to_onnx(model, example, batch, out)
    click.echo(f"wrote {out}")


def _to_onnx(
    model: torch.nn.Module, example: tuple[torch.Tensor], batch: torch.export.Dim, out: Path
) -> None:
    try:
        program = torch.onnx.export(
            model, example, dynamo=True, dynamic_shapes=({0: batch},), verbose=False
        )
    except ImportError as error:
        raise click.ClickException(
            f"{error.name} is not installed: pip install 'esper-morphogen[onnx]'"
        ) from error
    assert program is not None
    program.save(out)
