"""Recovery of a converted model by distillation from the dense one.

config     settings                        loss       KL of the head in chunks, relative errors
teacher    what is to be learned           experts    the routed experts in training
student    what trains, and how            distiller  all losses of a batch
data       windows of text, in order       loop       the steps: :func:`tune`
state      checkpoints                     parallel   several devices
"""

from __future__ import annotations

from .config import TuneConfig
from .loop import Tuning, tune
from .teacher import share_tensors

__all__ = ["TuneConfig", "Tuning", "share_tensors", "tune"]
