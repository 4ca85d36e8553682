"""The finished model of a run, from its folder alone."""

from esper import artifacts
from esper.kasmina import MorphableModel
from esper.tolaria import tasks
from esper.tolaria.runs.config import parse_config
from esper.tolaria.runs.folder import CONFIG_FILE
from esper.tolaria.runs.folder import RunFolder


def load_model(folder: RunFolder) -> tuple[MorphableModel, tasks.Task]:
    """Returns the finished model of a run, and its task.

    Raises:
        RunFolderError: If the folder is not one of a run.
        ModelFolderError: If there is no finished model, or it is damaged.
    """
    config = parse_config(folder.config_text(), str(folder.path / CONFIG_FILE))
    task = config.load_task()
    return artifacts.load(folder.model_path, config.build_host(task)), task
