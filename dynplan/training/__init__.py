"""The fine-tuning recipe on Hugging Face's Trainer, and how its result is judged. Extra: ``train``."""

from dynplan.errors import InputError
from dynplan.loading import load, load_tokenizer
from dynplan.training.data import Task, encode_labels, encode_rows, infer_task
from dynplan.training.evaluate import Row, evaluate, plain_model, planner_plans
from dynplan.training.models import check_tokens
from dynplan.training.recipe import finetune
from dynplan.training.record import check_output, load_run, read_rivals
from dynplan.training.report import rich_table, verdict, write_report
from dynplan.training.rows import Columns, read_rows
from dynplan.training.settings import Recipe

__all__ = [
    "Columns",
    "InputError",
    "Recipe",
    "Row",
    "Task",
    "check_output",
    "check_tokens",
    "encode_labels",
    "encode_rows",
    "evaluate",
    "finetune",
    "infer_task",
    "load",
    "load_run",
    "load_tokenizer",
    "plain_model",
    "planner_plans",
    "read_rows",
    "read_rivals",
    "rich_table",
    "verdict",
    "write_report",
]
