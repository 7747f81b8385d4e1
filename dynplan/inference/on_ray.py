"""The run on a Ray cluster: Ray Data reads and tokenizes windows, actors hold the model, Ray's sink writes.

Windows are the same as in one process and go through the model in the same batches, so what comes out is the
same too. A worker that dies is replaced, and Ray has what it was at done again; a file of the output is
written under a name that depends on its place alone, so that doing it again replaces it.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import ray
import ray.data
import torch
from ray.data.datasource import BlockBasedFileDatasink

from dynplan.errors import InputError
from dynplan.files import discard_folder, fresh_folder, settle_folder, write_whole, writing
from dynplan.inference.fields import Field
from dynplan.inference.formats import Output
from dynplan.inference.forwards import WindowRunner
from dynplan.inference.models import ModelSettings
from dynplan.inference.run import RunSettings, Summary
from dynplan.inference.tokens import Encoder
from dynplan.inference.windows import Shape, Window, WindowReader
from dynplan.loading import load_tokenizer, quiet

LOCAL = "local"
_FILE_ROWS = 2**16  # of a file of the output, at least, where there are more
_READER_CPUS = 0.5
_BLOCK_BYTES = 2**16  # that travel together: a few windows, or one actor would get them all


@dataclass(frozen=True)
class Cluster:
    """address: of a running cluster, or "local" for one of this machine that ends with the run; actors: that
    hold the model; threads: of each.

    Raises InputError for a number below 1.
    """

    address: str = LOCAL
    actors: int = 1
    threads: int = 1

    def __post_init__(self):
        for name in ("actors", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name}: expected a whole number from 1, got {getattr(self, name)}")


def run_on_ray(settings: RunSettings, cluster: Cluster) -> Summary:
    """Run a model over files on a cluster; all its machines see inputs, model and output under one path.

    The output is a folder of files ``part-000000...``, whose name says their format; by name they hold the
    rows in order. It is there whole or not at all.

    Raises InputError as :func:`~dynplan.inference.run.run` does, and where Ray cannot be reached.
    """
    for option, path in (("--output", settings.output), ("--bad-rows", settings.bad_path)):
        if path.exists():
            raise InputError(f"{option}: expected no file or folder of that name, got {path}")
    reader = settings.reader()
    shape = reader.shape()
    keys = reader.key_fields(shape)
    model = settings.model.load()
    length = settings.length(model)
    pad = load_tokenizer(settings.model.folder).pad_token_id
    output = Output(settings.output, WindowRunner(model, keys, settings.batch_size, pad).fields)
    del model
    with writing(settings.output):
        work = fresh_folder(settings.output.with_name(settings.output.name + ".unfinished-on-ray"))
        (work / "parts").mkdir()
    # Workers begin in folders of their own; paths mean what they mean here.
    place = Path.cwd()
    read = _Read(place, reader, shape, settings.model.folder, length, work)
    worker = {
        "place": place,
        "settings": settings.model,
        "keys": keys,
        "batch_size": settings.batch_size,
        "pad": pad,
        "threads": cluster.threads,
    }
    started = _connect(cluster)
    try:
        with _data_settings():
            files = ray.data.from_items(
                [{"file": number} for number in range(len(reader.files))],
                override_num_blocks=max(1, len(reader.files)),
            )
            # Ray would put reading into the actors if both asked for the same processors.
            windows = files.map_batches(read, batch_size=1, num_cpus=_READER_CPUS)
            rows = windows.map_batches(
                _Worker,
                fn_constructor_kwargs=worker,
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=cluster.threads,
                compute=ray.data.ActorPoolStrategy(size=cluster.actors),
            )
            sink = _Parts(str((work / "parts").absolute()), output)
            start = time.perf_counter()
            rows.write_datasink(sink)
            seconds = time.perf_counter() - start
    except ray.exceptions.RayError as error:
        raise _told(error) from error
    finally:
        if started:
            ray.shutdown()
    bad = _settle(settings, work, output)
    return Summary(sink.rows, bad, sink.rows, seconds)


def _connect(cluster: Cluster) -> bool:
    """Whether it was this call that connected."""
    if ray.is_initialized():
        return False
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # What ends a run is raised; it takes what a row did for a fault of its own, and says so at length.
    logging.getLogger("ray.data.exceptions").setLevel(logging.CRITICAL)
    options = {"log_to_driver": False, "logging_level": logging.WARNING}
    if cluster.address == LOCAL:
        # A processor for each reader beside those of the actors.
        cpus = cluster.actors * cluster.threads + 2
        options |= {"num_cpus": cpus, "include_dashboard": False}
    try:
        ray.init(cluster.address, **options)
    except Exception as error:  # Ray raises nearly anything here, a bare Exception where a start takes long
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"--ray: expected a cluster at {cluster.address}, got {reason}") from error
    return True


@contextmanager
def _data_settings() -> Iterator[None]:
    """Ray Data's settings for a run: blocks that keep their order, small ones, and errors as they are."""
    context = ray.data.DataContext.get_current()
    settings = {
        "target_max_block_size": _BLOCK_BYTES,
        "enable_progress_bars": sys.stderr.isatty(),
        "raise_original_map_exception": True,
    }
    was = {name: getattr(context, name) for name in settings}
    ordered = context.execution_options.preserve_order
    context.execution_options.preserve_order = True
    try:
        for name, value in settings.items():
            setattr(context, name, value)
        yield
    finally:
        for name, value in was.items():
            setattr(context, name, value)
        context.execution_options.preserve_order = ordered


@dataclass(frozen=True)
class _Read:
    """Turns numbers of files into windows and their tokens, and leaves bad rows in ``folder``."""

    place: Path
    reader: WindowReader
    shape: Shape
    model: Path
    length: int
    folder: Path

    def __call__(self, batch: dict) -> Iterator[dict]:
        quiet()
        os.chdir(self.place)
        encoder = Encoder(self.model, self.length)
        for number in batch["file"].tolist():
            bad: list[dict] = []
            for window in self.reader.read(number, self.shape):
                bad += window.bad
                if len(window):
                    tokens = encoder(window.firsts, window.seconds)
                    window.firsts, window.seconds, window.bad = [], None, []
                    yield {"window": [pickle.dumps((window, tokens))]}
            if bad:
                # Whole or not at all, and the same again where Ray has it done again.
                text = "".join(json.dumps(row) + "\n" for row in bad)
                write_whole(self.folder / f"bad-{number:06}.jsonl", text)


class _Worker:
    """Holds a model in an actor."""

    def __init__(
        self, place: Path, settings: ModelSettings, keys: list[Field], batch_size: int, pad: int, threads: int
    ):
        quiet()
        os.chdir(place)
        torch.set_num_threads(threads)
        self.runner = WindowRunner(settings.load(), keys, batch_size, pad)

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        windows: list[tuple[Window, object]] = [pickle.loads(item) for item in batch["window"].to_pylist()]
        return pyarrow.Table.from_batches([self.runner(*window) for window in windows])


class _Parts(BlockBasedFileDatasink):
    """Writes files in the formats of one process."""

    def __init__(self, folder: str, output: Output):
        # Ray has one suffix for a file; _settle gives it its own.
        super().__init__(folder, file_format="part", min_rows_per_file=_FILE_ROWS)
        self.output, self.rows = output, 0

    def on_write_complete(self, write_result) -> None:
        super().on_write_complete(write_result)
        self.rows = write_result.num_rows

    def write_block_to_file(self, block, file) -> None:
        table = block.to_arrow()
        with tempfile.TemporaryDirectory() as folder:
            pieces, finished = Path(folder) / "pieces", Path(folder) / "finished"
            with open(pieces, "wb") as whole:
                whole.write(self.output.header())
                for rows in table.combine_chunks().to_batches():
                    whole.write(self.output.piece(rows))
            self.output.finish(pieces, finished)
            with open(finished, "rb") as whole:
                while data := whole.read(2**20):
                    file.write(data)


def _settle(settings: RunSettings, work: Path, output: Output) -> int:
    """Name the files, and put them and the bad rows in their places; returns the number of these."""
    with writing(settings.output):
        suffix = "".join(settings.output.suffixes[-2:] if output.packed else settings.output.suffixes[-1:])
        parts = work / "parts"
        parts.mkdir(exist_ok=True)  # Ray removes a folder without files
        for number, path in enumerate(sorted(parts.iterdir())):
            os.replace(path, parts / f"part-{number:06}{suffix}")
        bad = [path.read_bytes() for path in sorted(work.glob("bad-*.jsonl"))]
        if bad:
            write_whole(settings.bad_path, b"".join(bad))
        settle_folder(parts, settings.output)
        discard_folder(work)
    return sum(data.count(b"\n") for data in bad)


def _told(error: Exception) -> Exception:
    """What a user can do something about, from inside of Ray's error; otherwise the error itself."""
    cause: BaseException | None = error
    while cause is not None:
        # Ray's error is made to be an InputError too, with a traceback for its text.
        if isinstance(cause, InputError) and not isinstance(cause, ray.exceptions.RayError):
            return InputError(str(cause))
        cause = getattr(cause, "cause", None) or cause.__cause__
    return error
