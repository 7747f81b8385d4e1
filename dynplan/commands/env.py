"""``dynplan env``: what a bug report needs."""

import importlib.metadata
import platform

from rich.console import Console
from rich.table import Table

NAME = "env"
_PACKAGES = ("torch", "transformers", "numpy", "safetensors", "accelerate", "scikit-learn", "scipy")


def command() -> None:
    """Print versions, instruction set, build information, threads and CUDA state."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts().items():
        table.add_row(name, str(value))
    Console(markup=False, highlight=False).print(table)


def facts() -> dict[str, object]:
    import torch

    import dynplan
    from dynplan import _library, _native

    found = {
        "dynplan": dynplan.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found |= {f"build: {key}": value for key, value in _library.build_info().items() if key != "version"}
    found |= {f"cpu: {key}": value for key, value in _native.cpu_features().items()}
    found["torch cpu capability"] = torch.backends.cpu.get_cpu_capability()
    found["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        found["cuda"] = f"{torch.version.cuda}, {torch.cuda.get_device_name()}"
    else:
        found["cuda"] = "no device" if torch.version.cuda else "torch is a CPU build"
    return found
