"""Places that finished steps go to. A tracker's library is imported when its sink is made."""

from gradprobe.sinks.csv import CSV
from gradprobe.sinks.feed import Feed
from gradprobe.sinks.jsonl import JSONL, write_jsonl
from gradprobe.sinks.mlflow import MLflow
from gradprobe.sinks.sink import Sink
from gradprobe.sinks.tensorboard import TensorBoard
from gradprobe.sinks.trackio import Trackio
from gradprobe.sinks.wandb import WandB

__all__ = ["CSV", "JSONL", "Feed", "MLflow", "Sink", "TensorBoard", "Trackio", "WandB", "write_jsonl"]
