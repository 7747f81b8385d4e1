"""What a run says while it works: its stage, its steps and the time left. Loggers named ``dynplan`` get the
lines as well, and each loss."""

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm
from transformers import TrainerCallback

from dynplan.files import writing

_log = logging.getLogger(__name__)
_FORMAT = "{desc}: step {n_fmt} of {total_fmt}, {remaining} left{postfix}"
_FIGURES = {"eval_score": "score", "eval_path_score": "score on random paths", "eval_quality": "quality"}


def steps(items: Iterable | None, title: str, progress: bool, **options) -> tqdm:
    """``items``, counted on one line of the terminal; in a file it would be a line for each."""
    hidden = not (progress and sys.stderr.isatty())
    return tqdm(items, desc=title, bar_format=_FORMAT, leave=False, disable=hidden, **options)


def say(line: str, progress: bool = True) -> None:
    """A line that stays, above the one that counts."""
    _log.info(line)
    if progress:
        tqdm.write(line, file=sys.stderr)


@contextmanager
def log_to(place: Path) -> Iterator[None]:
    """Everything that is said inside, with its time, also into the file ``place``; warnings there alone."""
    with writing(place):
        handler = logging.FileHandler(place, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    ours, warned = logging.getLogger("dynplan"), logging.getLogger("py.warnings")
    level, propagate = ours.level, warned.propagate
    with warnings.catch_warnings():
        logging.captureWarnings(True)
        ours.setLevel(logging.INFO)
        warned.propagate = False
        for logger in (ours, warned):
            logger.addHandler(handler)
        try:
            yield
        finally:
            for logger in (ours, warned):
                logger.removeHandler(handler)
            ours.setLevel(level)
            warned.propagate = propagate
            logging.captureWarnings(False)
            handler.close()


class StageProgress(TrainerCallback):
    """Counts the steps of a stage and says the figures of each evaluation."""

    def __init__(self, title: str, progress: bool):
        self.title, self.progress, self.bar = title, progress, None

    def on_train_begin(self, args, state, control, **kwargs):
        start = f", from step {state.global_step}" if state.global_step else ""
        say(f"{self.title}: {state.max_steps} steps{start}", self.progress)
        self.bar = steps(None, self.title, self.progress, total=state.max_steps, initial=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n if not self.bar.disable else 0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is not None and logs and "loss" in logs:
            _log.info("%s: step %d of %d, loss %.4f", self.title, state.global_step, state.max_steps,
                      logs["loss"])  # fmt: skip
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        for key, name in _FIGURES.items():
            if key in (metrics or {}) and self.bar is not None:
                epoch = f"epoch {state.epoch:.3g} of {args.num_train_epochs:.3g}"
                say(f"{self.title}: {epoch}, {name} {metrics[key]:.3f}", self.progress)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Also after an interruption, so that what is said next has a line of its own."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
