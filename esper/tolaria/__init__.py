"""Tolaria: the training side of Esper, and the client of all services."""

from esper.tolaria.attribution import attribution
from esper.tolaria.averaging import GrowingAverage
from esper.tolaria.checkpoint import Checkpoints
from esper.tolaria.evaluation import SampleLoss
from esper.tolaria.evaluation import Trial
from esper.tolaria.governor import TrainingFault
from esper.tolaria.history import EpochRecord
from esper.tolaria.history import History
from esper.tolaria.history import LifecycleEvent
from esper.tolaria.history import SeedAttribution
from esper.tolaria.sampling import ResumableSampler
from esper.tolaria.session import Session
from esper.tolaria.session import session
from esper.tolaria.trainer import Trainer

__all__ = [
    "Checkpoints",
    "EpochRecord",
    "GrowingAverage",
    "History",
    "LifecycleEvent",
    "ResumableSampler",
    "SampleLoss",
    "SeedAttribution",
    "Session",
    "Trainer",
    "TrainingFault",
    "Trial",
    "attribution",
    "session",
]
