"""The table of changes: what is done to models that were swapped, each under its name.

Entries stand in the modules named ``changed_...``; ``change.py`` says what an entry is.
"""

from integrations import (
    changed_adapters,
    changed_by_optimizers,
    changed_classes,
    changed_hooks,
    changed_modules,
    changed_stack,
    changed_surroundings,
    changed_weights,
)
from integrations.change import CHANGES, Change

__all__ = ["CHANGES", "SOURCES", "Change"]

# Importing them fills the table.
SOURCES = (
    changed_weights,
    changed_by_optimizers,
    changed_classes,
    changed_modules,
    changed_stack,
    changed_hooks,
    changed_adapters,
    changed_surroundings,
)
