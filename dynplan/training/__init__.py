"""The fine-tuning recipe on Hugging Face's Trainer, and how its result is judged. Extra: ``train``."""

from dynplan.training.data import InputError, Task, encode_rows, infer_task, read_rows
from dynplan.training.evaluate import Row, evaluate, load_run, plain_model, planner_plans
from dynplan.training.recipe import Recipe, check_output, finetune
from dynplan.training.report import rich_table, verdict, write_report

__all__ = [
    "InputError",
    "Recipe",
    "Row",
    "Task",
    "check_output",
    "encode_rows",
    "evaluate",
    "finetune",
    "infer_task",
    "load_run",
    "plain_model",
    "planner_plans",
    "read_rows",
    "rich_table",
    "verdict",
    "write_report",
]
