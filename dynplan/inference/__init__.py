"""Predictions and embeddings for files of rows. Extra: ``predict``."""

from dynplan.inference.models import ModelSettings
from dynplan.inference.run import RunSettings, Summary, run
from dynplan.inference.windows import InputColumns

__all__ = ["InputColumns", "ModelSettings", "RunSettings", "Summary", "run"]
