"""The report of a run: one HTML page that needs nothing else."""

from collections.abc import Sequence

from jinja2 import Environment
from jinja2 import PackageLoader
from jinja2 import StrictUndefined
from markupsafe import Markup

from esper.artifacts import ModelFolderError
from esper.tolaria.report import format_count
from esper.tolaria.runs import drawings
from esper.tolaria.runs.folder import RunFolder
from esper.tolaria.runs.model import load_model

_COUNTS = ("parameters", "flops")


def report(folder: RunFolder) -> str:
    """Returns the page of a run, finished or not.

    Raises:
        RunFolderError: If the folder is not one of a run, or is damaged.
    """
    environment = Environment(
        loader=PackageLoader("esper.tolaria.runs", "."), autoescape=True, undefined=StrictUndefined
    )
    info = folder.info()
    history = folder.history()
    parts = _parts(folder)
    return environment.get_template("report.html").render(
        name=folder.name,
        info=info,
        epochs=len(history.epochs),
        results={
            name.replace("_", " "): format_count(value) if name in _COUNTS else f"{value:.4f}"
            for name, value in info.results.items()
        },
        losses=Markup(drawings.losses(history)),
        lanes=Markup(drawings.lanes(history)),
        trials=history.trials,
        trials_drawing=Markup(drawings.trials(history)),
        attribution=(shares := folder.attribution()),
        attribution_drawing=Markup(drawings.attribution(shares)),
        size=Markup(drawings.size(history)),
        structure=Markup(drawings.structure(parts)) if parts else None,
        rollbacks=history.rollbacks,
        events=history.events,
        config=folder.config_text(),
    )


def _parts(folder: RunFolder) -> Sequence[tuple[str, int, Sequence[tuple[str, int]]]]:
    """Returns the modules of the finished model with their grafts; empty without one."""
    if not folder.model_path.exists():
        return []
    try:
        model, _ = load_model(folder)
    except ModelFolderError:
        return []
    grafts: dict[str, list[tuple[str, int]]] = {}
    for slot, seed in model.occupied_seeds():
        size = sum(parameter.numel() for parameter in model.seed_parameters(slot, seed))
        grafts.setdefault(slot, []).append((f"{slot}[{seed}]", size))
    parts = []
    for name, module in model.host.named_modules():
        size = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if size or name in grafts:
            parts.append((name or "(root)", size, grafts.pop(name, [])))
    parts += [(name, 0, left) for name, left in grafts.items()]
    return parts
