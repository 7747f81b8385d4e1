"""Trainer's checkpoints: each is there whole or not at all, and the newest good one is found again."""

import re
import shutil
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from dynplan.errors import WriteError
from dynplan.files import discard_folder, fresh_folder, settle_folder, writing

_STATE = "trainer_state.json"
_PARTS = ("*.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth", _STATE)


def newest_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole, together with the best one it knows of; None: there is none."""
    for _, path in sorted(_checkpoints(folder), reverse=True):
        if not all(any(path.glob(part)) for part in _PARTS):
            continue
        try:
            best = TrainerState.load_from_json(str(path / _STATE)).best_global_step
        except (OSError, ValueError, TypeError):
            continue
        if not best or (folder / f"checkpoint-{best}").is_dir():
            return str(path)
    return None


class BestCheckpoint(TrainerCallback):
    """Looks for the best checkpoint beside the others: the folder may have been moved since it was noted."""

    def on_train_begin(self, args, state, control, **kwargs):
        state.best_model_checkpoint = best_checkpoint(Path(args.output_dir), state)


def best_checkpoint(folder: Path, state: TrainerState) -> str | None:
    path = folder / f"checkpoint-{state.best_global_step}"
    return str(path) if path.is_dir() else None


class WholeCheckpoints:
    """For a Trainer: writes a checkpoint under another name and renames it; only then older ones go, all but
    the best.
    """

    _writing_to: str | None = None

    def _get_output_dir(self, trial):
        return self._writing_to or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        unfinished = folder / ".unfinished"
        try:
            with writing(folder / name):
                self._write(model, trial, unfinished)
                if self.args.should_save:
                    self._settle(folder, unfinished, name)
        except WriteError:
            shutil.rmtree(unfinished, ignore_errors=True)  # it may be what fills the disk
            raise
        self.accelerator.wait_for_everyone()
        self.state.best_model_checkpoint = best_checkpoint(folder, self.state)

    def _write(self, model, trial, unfinished: Path) -> None:
        if self.args.should_save:
            fresh_folder(unfinished)
        self.accelerator.wait_for_everyone()
        self._writing_to = str(unfinished)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writing_to = None
        self.accelerator.wait_for_everyone()

    def _settle(self, folder: Path, unfinished: Path, name: str) -> None:
        best = f"checkpoint-{self.state.best_global_step}"
        if best == name or (folder / best).is_dir():
            self.state.best_model_checkpoint = str(folder / best)
        self.state.save_to_json(str(unfinished / name / _STATE))
        settle_folder(unfinished / name, folder / name)
        unfinished.rmdir()
        for _, path in _checkpoints(folder):
            if path.name not in (name, best):
                discard_folder(path)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    found = [(re.fullmatch(r"checkpoint-([0-9]+)", path.name), path) for path in folder.glob("checkpoint-*")]
    return [(int(match[1]), path) for match, path in found if match and path.is_dir()]
