"""Entry point of the `esper` command."""

from importlib import import_module
from importlib.metadata import version

import click

# Module and one-line help of every subcommand, so that `esper --help` imports none of them. Each
# module has a click command called `command`.
_COMMANDS = {
    "demo": (
        "esper.cli.demo",
        "Grow a small model on real digits and compare it with static ones.",
    ),
    "train": ("esper.cli.train", "Train and grow the model of a configuration file."),
    "report": ("esper.cli.report", "Make an HTML page of a run."),
    "runs": ("esper.cli.runs", "List, show, compare and verify runs."),
    "export": ("esper.cli.export", "Export the finished model of a run."),
    "evaluate": ("esper.cli.evaluate", "Print the test accuracy of a saved model."),
    "serve": ("esper.cli.serve", "Run the plane, or one service of it."),
    "status": ("esper.cli.status", "Show a running plane."),
    "urza": ("esper.cli.urza", "Look after a store: figures, check, gc, backup, restore, compact."),
    "oona": ("esper.cli.oona", "Look after an event log: backup, restore, compact."),
}


class _LazyGroup(click.Group):
    """A group that imports a subcommand when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _ = _COMMANDS[cmd_name]
        command: click.Command = import_module(module).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(version("esper-morphogen"), prog_name="esper")
def cli() -> None:
    """Esper lets a PyTorch model grow while it trains.

    Exit status: 0 on success, 1 when a command fails, 2 when it was called wrongly, 130 on Ctrl-C.
    """


def main() -> None:
    """Runs the `esper` command; a mistake of the user ends with one line and exit status 1."""
    try:
        # Outside standalone mode click returns the status of `ctx.exit` and raises its errors.
        status = cli.main(prog_name="esper", standalone_mode=False)
    except click.UsageError as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except (click.Abort, KeyboardInterrupt):
        click.echo("esper: interrupted", err=True)
        raise SystemExit(130) from None
    except (click.ClickException, ValueError, OSError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"esper: {' '.join(message.split())}", err=True)
        raise SystemExit(1) from None
    raise SystemExit(status if isinstance(status, int) else 0)
