"""Draws a short run with each planted fault, and notes what the probe says of it: for the pages of the findings.

The runs are those of diagnosis.py, on handwritten digits.

    python benchmarks/finding_pictures.py [docs/img/findings] [--topics vanishing "dead ReLU" ...]

Writes one PNG per topic of `gradprobe explain`, and findings.json with each run's name, number of steps and note.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from _faulty import FAULTY
from _run import Run, train

import gradprobe
from gradprobe.cli.topics import TOPICS
from gradprobe.report.chart_parts import png

SEED = 1000  # no threshold was tuned on it
# The run of each topic, and the chart that shows its fault.
PICTURES = {
    "vanishing": ("MLP of 20, sigmoid", "heatmap"),
    "exploding": ("MLP of 40, tanh, large weights", "heatmap"),
    "loss blow-up": ("MLP, leaky ReLU, rate of 50", "loss"),
    "non-finite": ("MLP, NaN in a batch", "heatmap"),
    "dead ReLU": ("MLP, dead units", "dead_units"),
    "dying": ("MLP, most units dead", "heatmap"),
    "silent parameter": ("branch times zero", "heatmap"),
    "gradients not cleared": ("MLP, no zero_grad", "heatmap"),
    "saturation": ("MLP of 6, tanh, huge weights", "magnitude"),
    "poor initialisation": ("MLP of 12, ReLU, small weights", "magnitude"),
    "precision loss": ("MLP, float16, loss times 1e-5", "magnitude"),
    "updates too large": ("MLP, AdamW, rate of 0.1", "update_ratio"),
    "updates too small": ("MLP, bfloat16 weights, rate of 1e-4", "update_ratio"),
    "unstable loss": ("RNN, rate of 0.3", "loss"),
    "not learning": ("MLP, shuffled labels", "loss"),
    "spike": ("MLP, outlier", "heatmap"),
    "layer drift": ("MLP, a layer dies at step 25", "heatmap"),
}


def run_of(topic: str) -> Run:
    """Returns the run that shows a topic's fault."""
    (run,) = [run for run in FAULTY if run.name == PICTURES[topic][0]]
    return run


def note_of(topic: str, probe: gradprobe.Probe) -> str:
    """Returns the note on the topic's fault in a run.

    Raises:
        LookupError: The run does not have the fault.
    """
    for finding in probe.findings():
        if finding.title in TOPICS[topic].rules:
            return str(finding)
    raise LookupError(f"{topic} is not among the findings of {PICTURES[topic][0]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs/img/findings"))
    parser.add_argument("--topics", nargs="+", choices=list(PICTURES), default=list(PICTURES))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    listing = arguments.folder / "findings.json"
    noted = json.loads(listing.read_text(encoding="utf-8")) if listing.exists() else {}
    for topic in arguments.topics:
        run, chart = run_of(topic), PICTURES[topic][1]
        probe = train(run, SEED)
        noted[topic] = {"run": run.name, "n_steps": run.n_steps, "chart": chart, "note": note_of(topic, probe)}
        (arguments.folder / f"{topic.replace(' ', '-')}.png").write_bytes(png(probe.plot(chart)))
        probe.detach()
        print(f"{topic}: {noted[topic]['note'].splitlines()[1].strip()}")
    in_order = {topic: noted[topic] for topic in TOPICS if topic in noted}
    listing.write_text(json.dumps(in_order, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
