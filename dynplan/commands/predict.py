"""``dynplan predict``: labels or scores for rows of files."""

from dynplan.commands import options
from dynplan.commands.options import Text, TextPair, Threads

NAME = "predict"


def command(
    model: options.Model,
    inputs: options.Inputs,
    output: options.Output,
    key: options.Key = None,
    text: Text = "sentence1",
    text_pair: TextPair = None,
    budget: options.Budget = None,
    stream_budget: options.StreamBudget = None,
    burst: options.Burst = None,
    weights: options.Weights = None,
    batch_size: options.BatchSize = 32,
    window: options.WindowSize = 2048,
    max_length: options.MaxLength = None,
    workers: options.Workers = 1,
    threads: Threads = None,
    skip_bad: options.SkipBad = False,
    bad_rows: options.BadRows = None,
    resume: options.Resume = False,
    ray: options.Ray = None,
    actors: options.Actors = 1,
) -> None:
    """Write label and probabilities (or score), path and layers run of every row, in the rows' order."""
    options.need("predict", "pyarrow")
    from dynplan.commands.inference import run_files
    from dynplan.inference import InputColumns, ModelSettings, RunSettings

    settings = RunSettings(
        ModelSettings(model, "predict", budget, weights, stream_budget=stream_budget, burst=burst),
        tuple(inputs),
        output,
        InputColumns(text, text_pair, key),
        skip_bad,
        bad_rows,
        batch_size,
        window,
        max_length,
        workers,
    )
    run_files(settings, threads, resume, ray, actors)
