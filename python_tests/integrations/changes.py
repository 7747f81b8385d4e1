"""The table of changes: what is done to models that were swapped, each under its name.

Entries stand in the modules named ``changed_...``; ``change.py`` says what an entry is.
"""

import integrations.changed_adapters
import integrations.changed_hooks
import integrations.changed_modules
import integrations.changed_surroundings
import integrations.changed_weights  # noqa: F401
from integrations.change import CHANGES, Change

__all__ = ["CHANGES", "Change"]
