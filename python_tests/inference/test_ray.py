"""On a cluster of this machine: the same rows as one process, also when a worker is killed in the middle."""

import csv
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray
from inference.conftest import make_records, write_lines
from pyarrow import parquet
from test_cli import failure

from dynplan.errors import InputError
from dynplan.inference import InputColumns, ModelSettings, RunSettings, run
from dynplan.inference.on_ray import Cluster, run_on_ray


@pytest.fixture(scope="module")
def cluster():
    """Two workers for models, beside those that read; one cluster for all tests, as its start is slow."""
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=2**27,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
    )
    yield Cluster(actors=2)
    ray.shutdown()


@pytest.fixture(scope="module")
def job(planned, tmp_path_factory):
    """Two files, of which one has a bad row, under random paths."""
    place = tmp_path_factory.mktemp("ray")
    records = make_records(1500)
    folder = place / "rows"
    folder.mkdir()
    write_lines(folder / "a.jsonl", records[:250])
    second = write_lines(folder / "b.jsonl", records[250:])
    second.write_text(second.read_text() + "not JSON\n")
    settings = RunSettings(
        ModelSettings(planned), (folder,), place / "one.csv", InputColumns(key="id"), skip_bad=True,
        batch_size=4, window=16, workers=0,
    )  # fmt: skip
    run(settings, progress=False)
    return settings


@dataclass(frozen=True)
class Dying(ModelSettings):
    """Of a model whose first process to come to some window of the second file is killed there."""

    flag: Path | None = None

    def load(self):
        model = super().load()
        restart = model.restart

        def restart_or_die(file: int, window: int) -> None:
            if (file, window) == (1, 30):
                try:
                    open(self.flag, "x").close()
                except FileExistsError:
                    pass
                else:
                    os.kill(os.getpid(), signal.SIGKILL)
            restart(file, window)

        model.restart = restart_or_die
        return model


def test_a_killed_worker_loses_and_doubles_no_row(cluster, job):
    output, flag = job.output.with_name("ray.csv"), job.output.with_name("killed")
    dying = Dying(job.model.folder, flag=flag)
    done = run_on_ray(replace(job, model=dying, output=output), cluster)
    assert flag.exists()
    assert (done.rows, done.bad) == (1500, 1)
    parts = sorted(output.iterdir())
    assert [path.name for path in parts] == [f"part-{i:06}.csv" for i in range(len(parts))]
    lines = [path.read_bytes().splitlines(keepends=True) for path in parts]
    header, *rows = job.output.read_bytes().splitlines(keepends=True)
    assert {part[0] for part in lines} == {header}
    assert [row for part in lines for row in part[1:]] == rows
    assert output.with_name("ray.csv.bad.jsonl").read_bytes() == job.bad_path.read_bytes()
    assert not list(output.parent.glob("*.unfinished*"))


def test_embeddings_as_parquet(cluster, job):
    one = replace(
        job, model=replace(job.model, task="embed"), output=job.output.with_name("one.parquet"), window=64
    )
    run(one, progress=False)
    many = replace(one, output=job.output.with_name("many.parquet"))
    run_on_ray(many, replace(cluster, actors=1))
    assert parquet.read_table(many.output).equals(parquet.read_table(one.output))


def test_every_worker_keeps_a_stream_of_its_own(cluster, job, leaving):
    model = ModelSettings(leaving, stream_budget=0.4, burst=4)
    many = replace(job, model=model, output=job.output.with_name("stream.csv"), window=64)
    run_on_ray(many, cluster)
    rows = [
        row for path in sorted(many.output.iterdir()) for row in csv.DictReader(path.read_text().splitlines())
    ]
    assert [row["id"] for row in rows] == [record["id"] for record in make_records(1500)]
    layers = sum(int(row["layers"]) for row in rows)
    assert 0.35 * 4 * 1500 < layers <= (0.4 * 1500 + 2 * 4) * 4


def test_what_a_worker_finds_wrong_is_told_in_a_line(cluster, job):
    with pytest.raises(InputError) as told:
        run_on_ray(
            replace(job, output=job.output.with_name("bad.csv"), skip_bad=False), replace(cluster, actors=1)
        )
    assert str(told.value).startswith(
        f"{job.inputs[0] / 'b.jsonl'}:1251: expected one JSON object a line, got "
    )
    assert not job.output.with_name("bad.csv").exists()
    with pytest.raises(InputError, match="--output: expected no file or folder of that name, got .*one.csv"):
        run_on_ray(job, cluster)


def test_the_extra_is_named(planned, tmp_path, capsys, monkeypatch):
    source = write_lines(tmp_path / "in.jsonl", make_records(2))
    order = [
        "predict",
        "--model",
        planned,
        "--input",
        source,
        "--output",
        tmp_path / "o.csv",
        "--ray",
        "local",
    ]
    assert failure(capsys, monkeypatch, *order, "--resume")[0].startswith(
        "error: --resume: expected no --ray"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "ray" else object())
    text, status = failure(capsys, monkeypatch, *order)
    assert status == 2 and "expected ray to be installed, got none; run: pip install 'dynplan[ray]'" in text
