"""The report of a sweep as one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from gradprobe.report.chart_parts import NARROW, THIRDS, WIDE
from gradprobe.report.error_comparison import (
    EARLIEST_COMPARISON,
    FALLING_SHARE,
    LAST_SHARE,
    ONE_SEED_MARGIN_PCT,
    SLOW_START_STEPS,
    TRAINED_SHARE,
)
from gradprobe.report.formatting import RUNNING_NOTE, duration, percent
from gradprobe.report.page_parts import Cell, dark_rules, figure, head, table, typeset
from gradprobe.report.page_template import document
from gradprobe.report.paired_tests import contrasts, opening
from gradprobe.report.palette import Palette
from gradprobe.report.profiles import GradientProfile
from gradprobe.report.published_errors import CITATION, PublishedTable, matching_tables
from gradprobe.report.records import SPEC_KEY, SweepRun
from gradprobe.report.seed_statistics import MARGIN, SINGLE_SEED_MARGIN
from gradprobe.report.sentences import explain_verdict, headline, shortcut_sentences, zero_start_sentences
from gradprobe.report.summary import (
    DEGRADED,
    MORE_SEEDS,
    NOT_LEARNING,
    OVERFITTING,
    TOO_EARLY,
    NetSummary,
    Summary,
    summarise,
)
from gradprobe.report.sweep_charts import (
    curves_chart,
    draws_running_errors,
    error_chart,
    gradient_chart,
    hidden_junctions,
    hidden_layers,
    shortcut_chart,
)
from gradprobe.snapshot.files import create_folder, write_files
from gradprobe.text.markup import escape
from gradprobe.text.words import number

_CLASSES = {
    "healthy": "healthy",
    DEGRADED: "degraded",
    OVERFITTING: "degraded",
    NOT_LEARNING: "degraded",
    MORE_SEEDS: "unknown",
    TOO_EARLY: "unknown",
    None: "unknown",
}


def write(run: SweepRun, path: str | Path) -> Path:
    """Writes the page.

    Args:
        run: The recorded sweep, finished or not.
        path: The HTML file; missing folders are created, an existing file is replaced once the page is complete.

    Returns:
        The path written.

    Raises:
        StoreError: The file cannot be written.
    """
    path = Path(path)
    text = page(summarise(run))
    create_folder(path.parent)
    write_files({path: [text]})
    return path


def page(summary: Summary) -> str:
    """Returns the page as a complete HTML document."""
    data = str(summary.config.get("data", "unknown data"))
    parts = [
        f'<p class="facts">{escape(_facts(summary))}</p>',
        _notice(summary),
        *(f'<p class="lead">{typeset(line)}</p>' for line in (opening(summary), *headline(summary)) if line),
        *_figures(summary),
        _table(summary),
        _tests(summary),
        _verdicts(summary),
        *(_published(summary, table) for table in matching_tables(summary)),
        _method(),
        _settings(summary),
    ]
    body = "\n".join(part for part in parts if part)
    return document(f"Degradation sweep on {data}", dark_rules(Palette(summary).dark()), body)


def _facts(summary: Summary) -> str:
    seeds = {result.cell.seed for net in summary.nets for result in net.results}
    facts = [f"{summary.cells_planned} training runs", f"{len(summary.nets)} networks × {len(seeds)} seeds"]
    if len(seeds) == 1:
        facts[1] = f"{len(summary.nets)} networks, one seed"
    if "epochs" in summary.config:
        facts.append(f"{summary.config['epochs']} epochs")
    seconds = sum(net.seconds for net in summary.nets)
    if seconds > 0:
        facts.append(f"{duration(seconds)} of training")
    return " · ".join(facts)


def _notice(summary: Summary) -> str:
    done, planned = summary.cells_finished, summary.cells_planned
    if not planned:
        return '<p class="notice">The run has no networks yet.</p>'
    if done == planned:
        return ""
    return f'<p class="notice">{done} of {planned} runs are finished. Everything below is preliminary.</p>'


def _figures(summary: Summary) -> Iterable[str]:
    several = any(len(net.counted) > 1 for net in summary.nets)
    caption = "Error against depth, on one scale for both panels."
    if several:
        caption += " Circles are seeds, dots their means, bars one standard deviation to each side."
    if any(not net.finished for net in summary.nets):
        caption += " Networks that are still training are shown at their newest epoch."
    charts = [error_chart(summary, size) for size in (WIDE, NARROW)]
    yield figure("Error against depth", charts, caption, "No finite error is recorded yet.")
    caption = "Errors over the full training and test sets at the end of each epoch; epoch 0 is before the first step."
    if draws_running_errors(summary):
        caption = (
            "The training error is that of the epoch's steps, each before its update; epoch 0 is before the first step."
        )
    caption += " Large errors of the first epochs may be above the chart, as in figure 1 of He et al."
    if several:
        caption += " Lines are means over seeds, bands their range."
    charts = [curves_chart(summary, size) for size in (WIDE, NARROW)]
    yield figure("Error while training", charts, caption, "No epoch is finished yet.")
    caption = "L2 norm of each weight's gradient, layer by layer, on a logarithmic scale."
    if several:
        caption += " Lines are medians over seeds, bands their range."
    hidden = hidden_layers(summary)
    if hidden:
        caption += (
            f" Not shown, since a logarithmic scale has no place for zero, NaN and infinite norms: {'; '.join(hidden)}."
        )
    nothing = "Every recorded norm is zero, NaN or infinite." if hidden else "No gradient is recorded yet."
    charts = [gradient_chart(summary, size) for size in (WIDE, NARROW)]
    yield figure("The gradient on its way to the input", charts, caption, nothing)
    yield _shortcut_figure(summary, several)


def _shortcut_figure(summary: Summary, several: bool) -> str:
    sentences = shortcut_sentences(summary)
    if not sentences:
        return ""
    caption = (
        "At every residual add, the norm of the part of the gradient that arrives by the shortcut, divided by the sum "
        "of this norm and the norm of the part that arrives through the branch."
    )
    if several:
        caption += " Lines are medians over seeds, bands their range."
    hidden = hidden_junctions(summary)
    if hidden:
        caption += " Not shown if one part is missing, as behind a shortcut that changes the shape: "
        caption += f"{'; '.join(hidden)}."
    charts = [shortcut_chart(summary, size) for size in (THIRDS, NARROW)]
    lead = "\n".join(f"<p>{typeset(sentence)}</p>" for sentence in sentences)
    return figure("The gradient that arrives by the shortcut", charts, caption, "Nothing to draw.", lead)


def _table(summary: Summary) -> str:
    if not summary.nets:
        return ""
    groups = '<td colspan="6"></td><th colspan="3" class="group" scope="colgroup">gradient at the first step</th>'
    groups += '<th colspan="3" class="group" scope="colgroup">gradient at the end</th>'
    texts = ("network", "verdict", "seeds")
    numbers = ("parameters", "training\nerror %", "test\nerror %", *("first", "last", "first/last") * 2)
    columns = "".join([*(head(title, "text") for title in texts), *map(head, numbers)])
    rows = "\n".join(_table_row(net) for net in summary.nets)
    notes = "".join(f" {typeset(sentence)}" for sentence in zero_start_sentences(summary))
    if summary.has_running_errors:
        notes += f" {RUNNING_NOTE}."
    return (
        f'<h2>All numbers</h2>\n<div class="scroll" tabindex="0" role="region" aria-label="All numbers">'
        f'<table class="sortable">\n<thead><tr>{groups}</tr>\n<tr>{columns}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>\n"
        '<p class="note">Errors are mean ± standard deviation over seeds. Gradient norms are those of the first and '
        f"the last weight layer, medians over seeds.{notes}</p>"
    )


def _table_row(net: NetSummary) -> str:
    mark = "*" if net.has_running_error else ""
    errors = [
        (percent(spread) + shown, spread.mean if spread else math.nan)
        for spread, shown in ((net.train_error_pct, mark), (net.test_error_pct, ""))
    ]
    cells = [(f"{net.parameters:,}", net.parameters), *errors, *_ends(net.initial), *_ends(net.end)]
    numbers = "".join(f'<td data-value="{value}">{typeset(shown)}</td>' for shown, value in cells)
    when = f'<span class="small">{net.verdict_profile.when}</span>' if net.verdict_profile else ""
    return (
        f'<tr><th scope="row">{escape(net.name)}</th><td class="text">{_verdict(net)}{when}</td>'
        f'<td class="text">{escape(net.progress)}</td>{numbers}</tr>'
    )


def _ends(profile: GradientProfile | None) -> list[tuple[str, float]]:
    if profile is None:
        return [("–", math.nan)] * 3
    return [(number(value), value) for value in (profile.first, profile.last, profile.ratio)]


def _verdict(net: NetSummary) -> str:
    return f'<span class="verdict {_CLASSES.get(net.verdict, "broken")}">{escape(net.verdict or "none yet")}</span>'


def _verdicts(summary: Summary) -> str:
    if not summary.nets:
        return ""
    items = "\n".join(
        f"<dt>{escape(net.name)}</dt><dd>{_verdict(net)}<br>{typeset(explain_verdict(net))}</dd>"
        for net in summary.nets
    )
    return f"<h2>Verdicts and their evidence</h2>\n<dl>\n{items}\n</dl>"


def _tests(summary: Summary) -> str:
    tested = [(one, one.test) for one in contrasts(summary) if one.test is not None]
    if not tested:
        return ""
    columns = ("training errors", "epoch", "difference", "95 % from", "to", "p", "effect d", "seeds")
    rows = [
        (
            f"{one.name} − {one.other}" + (" (too early)" if one.early else ""),
            [*map(Cell, (one.epoch, test.mean, *test.interval, test.p_value, test.effect, len(one.seeds)))],
        )
        for one, test in tested
    ]
    return (
        f"<h2>Paired tests over seeds</h2>\n{table('Paired tests over seeds', columns, rows)}\n"
        '<p class="note">Differences of training errors in percentage points, seed by seed; two-sided t-tests, not '
        "adjusted for their number. The effect d is the mean difference over its standard deviation.</p>"
    )


def _published(summary: Summary, table: PublishedTable) -> str:
    here = {(net.family, net.depth): percent(net.test_error_pct) for net in summary.nets}
    rows = []
    for (family, depth), printed in table.error_pct.items():
        ours = typeset(here.get((family, depth), "–"))
        rows.append(f'<tr><th scope="row">{family}-{depth}</th><td>{ours}</td><td>{printed}</td></tr>')
    return (
        f"<h2>Compared with the paper</h2>\n<p>{CITATION} report the {escape(table.what)}. "
        f"Their conditions: {escape(table.conditions)} Here: {escape(_conditions(summary))}.</p>\n"
        '<table style="min-width:0"><thead><tr><th class="text">network</th><th>here, test error&nbsp;%</th>'
        "<th>He et al., error&nbsp;%</th></tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table>"
    )


def _conditions(summary: Summary) -> str:
    """States how the sweep's test errors were measured, as far as its configuration tells."""
    config = summary.config
    parts = [f"test error on {config.get('data', 'unknown data')}"]
    if "train_images" in config:
        parts.append(
            f"{config['train_images']:,} training images{'' if config.get('augmented') else ', not augmented'}"
        )
    parts += [f"{name.replace('_', ' ')} {config[name]}" for name in ("epochs", "batch_size") if name in config]
    return ", ".join([*parts, "a single view at test"])


_METHOD = (
    "gradprobe recorded the gradients while the networks trained: one pass over each weight's gradient, accurate to "
    "about 1e-6 relative over the whole range of the data type. The norm is of the gradient that the optimizer used.",
    "“At the first step” is the gradient of the first training step, at initialisation. At a later epoch it is, layer "
    "by layer, the median over that epoch's steps. Only weights of more than one dimension are shown, in depth order.",
    "At a residual add, y = x + F(x), the gradient at x is the sum of the part that takes the shortcut and the "
    "part that comes back through the branch F (He et al. 2016, arXiv:1603.05027). Residual adds are observed in the "
    "first step of every epoch: “after epoch 10” is the first step of epoch 11.",
    "A gradient is vanishing, exploding or healthy by the ratio of its norm in the first weight layer to that in the "
    "last (thresholds of AUTOTRAINER, Zhang et al., ICSE 2021), and non-finite if any element is NaN or infinite. "
    "With several seeds the most frequent verdict counts. A gradient that explodes at the first step and vanishes "
    "later is called exploding: large steps along it can make it vanish.",
    "“Degraded optimisation” means: the gradient is healthy, but the training error is clearly above that of a "
    "shallower network of the same family. With several seeds on both sides, “clearly above” requires Welch's "
    f"one-sided t-test at 95 % and at least {MARGIN:g} percentage points between the means; with a single seed, at "
    f"least {ONE_SEED_MARGIN_PCT:g} points, and it says something about that run only. A single seed whose training "
    f"error is higher by {SINGLE_SEED_MARGIN:g} points or more, but by less than that, “needs more seeds”.",
    "“Too early” means: the gradient is healthy, but training errors cannot be compared yet. Both networks are "
    f"compared after the same epoch, and not before {100 * EARLIEST_COMPARISON:g} % of the planned epochs. The "
    f"training error of the shallower network must be at most {100 * TRAINED_SHARE:g} % of that before its first step, "
    f"and so must that of the deeper one unless it has taken {SLOW_START_STEPS} steps (ResNet-110 needs about that "
    "many before its error falls, He et al., section 4.2). Nor may either have fallen, over the last "
    f"{100 * LAST_SHARE:g} % of the epochs, by {100 * FALLING_SHARE:g} % of the difference.",
    "He et al. 2015 (arXiv:1512.03385, section 4.1) found vanishing gradients an unlikely cause of this degradation in "
    "networks with batch normalisation.",
    "“Overfitting” means: the gradient is healthy and the training error is not clearly above that of a shallower "
    "network, but the test error is, and so is its distance from the training error (the argument of He et al. on "
    "their 1202 layers, section 4.2); or the test error is clearly above its own minimum while the training error fell "
    "from there on (after Prechelt 1998). For test errors, “clearly” counts standard errors of the difference of two "
    "proportions of the test images instead of points: with few images they are large.",
    "“Not learning” means: the gradient is healthy and no shallower network of the family trains better, but the "
    f"training error is not clearly below its value before the first step, after {SLOW_START_STEPS} steps or more.",
)


def _method() -> str:
    points = "\n".join(f"<li>{escape(point)}</li>" for point in _METHOD)
    return f"<h2>How the numbers were measured</h2>\n<ul>\n{points}\n</ul>"


def _settings(summary: Summary) -> str:
    specs = [key for key in summary.meta if SPEC_KEY.fullmatch(key)]
    facts = {**summary.config, **{key: value for key, value in summary.meta.items() if key != "config"}}
    items = "\n".join(
        f"<dt>{escape(_words(key))}</dt><dd>{_spec(str(value)) if key in specs else escape(_value_text(value))}</dd>"
        for key, value in facts.items()
    )
    return f'<h2>The run</h2>\n<dl class="run">\n{items}\n</dl>'


def _spec(text: str) -> str:
    """Keeps the lines of a spec file; a line break anywhere else is spelled out."""
    return "<br>".join(map(escape, text.split("\n")))


def _words(key: str) -> str:
    return key.replace("_", " ")


def _value_text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(str(key))} {_value_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_value_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
