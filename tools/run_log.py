"""What a person sees of a run: a progress bar on a terminal, lines in a log file, a plot and a summary at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from reflectron.engine.config import Config
from reflectron.engine.data.batch_source import SampleId
from reflectron.engine.files import write_text
from reflectron.engine.terminal import console
from reflectron.engine.training.diagnostics import NonfiniteFinding, Spike, SpikeDetector
from reflectron.engine.training.metrics import MetricsLog, StepMetrics, read_rows
from reflectron.engine.training.terms import TERMS, MeanTerms
from reflectron.tools.load_config import to_yaml


class RunLog:
    """Shows and records a run, on the main rank only.

    Args:
        config: the run; its resolved form is written beside the metrics.
        total_steps: length of the run.
        first_step: updates done before, when a run is resumed.
    """

    def __init__(self, config: Config, total_steps: int, first_step: int) -> None:
        self.config, self.total_steps, self.first_step = config, total_steps, first_step
        self.folder = Path(config.output_dir)
        self.metrics = MetricsLog(config, first_step)
        window = config.train.spike_window
        rows = read_rows(self.folder / "metrics.jsonl")[-window:]
        losses = [row["loss"] for row in rows if row.get("loss") is not None]
        self.spikes = SpikeDetector(window, config.train.spike_threshold, losses)
        write_text(self.folder / "config.yaml", to_yaml(config))
        self.console = console()
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self.console,
            # What others print meanwhile must not be read for escape sequences.
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not sys.stdout.isatty(),
        )
        self.task = self.progress.add_task("", total=total_steps, completed=first_step)
        self.progress.start()
        self.seconds = 0.0
        self._show_notes()

    def line(self, text: str) -> None:
        """Show something that happened beside the steps."""
        self.console.print(text, soft_wrap=True)

    def step(self, row: StepMetrics, sample_ids: Callable[[], list[SampleId]]) -> None:
        """Record a step, and show it: as the bar's text on a terminal, else as a line now and then.

        Args:
            row: the step.
            sample_ids: its samples, for the note of a spike.
        """
        waited = self.metrics.waiting
        self.metrics.write(row)
        self._show_notes()
        if self.metrics.waiting and not waited:
            self.line(f"rows wait in memory until they can be written, training continues: {self.metrics.waiting}")
        if not row.skipped and (spike := self.spikes.look(row.loss)):
            self._note_spike(row, spike, sample_ids())
        self.seconds += row.step_time_ms / 1e3
        text = describe(row)
        self.progress.update(self.task, completed=row.step, description=text)
        every = max(self.total_steps // 20, 1)
        if self.progress.disable and (row.step % every == 0 or row.step in (1, self.total_steps)):
            seconds_per_step = self.seconds / (row.step - self.first_step)
            left = timedelta(seconds=round(seconds_per_step * (self.total_steps - row.step)))
            self.line(f"step {row.step}/{self.total_steps}  {text}  eta {left}")

    def _show_notes(self) -> None:
        while self.metrics.notes:
            self.line(self.metrics.notes.pop(0))

    def _note_spike(self, row: StepMetrics, spike: Spike, samples: list[SampleId]) -> None:
        self.line(
            f"step {row.step}/{self.total_steps}  loss {row.loss:.3f} is a spike: the median of the steps before is "
            f"{spike.median:.3f}; {self.folder / 'spikes.jsonl'} names its samples"
        )
        terms = dict(zip(TERMS, row.values(), strict=True))
        found = {"step": row.step, **terms, "grad_norm": row.grad_norm, **vars(spike)}
        self.metrics.append("spikes", found | {"samples": [vars(sample) for sample in samples]})

    def skipped(
        self, row: StepMetrics, findings: list[NonfiniteFinding], samples: list[SampleId], in_a_row: int
    ) -> None:
        """Record and show why a step was skipped: a line, and one for each finding."""
        allowed = self.config.train.max_skipped_steps
        self.line(
            f"step {row.step}/{self.total_steps}  skipped: loss {row.loss}, gradient norm {row.grad_norm} "
            f"({in_a_row} in a row, train.max_skipped_steps is {allowed})"
        )
        for finding in findings:
            names = ", ".join(str(samples[position]) for position in finding.samples)
            self.line(f"  {finding}{'; samples: ' if names else ''}{names}")
        if not findings:
            self.line("  a second look found only finite numbers: a transient fault of hardware or communication")
        rows = [
            {"rank": finding.rank, **finding.not_finite(), "samples": [vars(samples[i]) for i in finding.samples]}
            for finding in findings
        ]
        self.metrics.append("nonfinite", {"step": row.step, "in_a_row": in_a_row, "findings": rows})

    def validation(self, step: int, terms: MeanTerms) -> None:
        """Record and show held-out loss terms."""
        self.metrics.write_validation(step, vars(terms))
        self.line(f"step {step}/{self.total_steps}  validation: {describe_terms(terms)}")

    def evaluation(self, step: int, shares: dict[str, float]) -> None:
        """Record and show pass@1 by suite of tests."""
        self.metrics.write_evaluation(step, shares)
        text = "  ".join(f"{suite} {100 * share:.1f} %" for suite, share in shares.items())
        self.line(f"step {step}/{self.total_steps}  {self.config.eval.dataset} pass@1: {text}")

    def finish(self, export: Path) -> None:
        """Plot the run and say where everything is."""
        self.close()
        plot = plot_run(self.folder)
        rows = [row for row in read_rows(self.folder / "metrics.jsonl") if row.get("loss") is not None]
        curve = f"loss {rows[0]['loss']:.3f} -> {rows[-1]['loss']:.3f}" if rows else "no finite loss"
        self.line(
            f"\n{curve} in {self.total_steps} steps\n"
            f"checkpoint  {export}  (transformers: AutoModelForCausalLM.from_pretrained)\n"
            f"plot        {plot}\n"
            f"metrics     {self.folder / 'metrics.jsonl'}\n\n"
            "Next:\n"
            f"  reflectron validate {self.folder / 'config.yaml'} --model {export}\n"
            f"  reflectron inspect --data {self.config.data.train[0].path} --tokenizer {export} --limit 2\n"
            f"  reflectron train {self.folder / 'config.yaml'} mask.strategy=all output_dir={self.folder}-all-masked\n"
            "  and on your own data: set data.train and model.path; docs/configuration.md lists every key\n"
        )

    def close(self) -> None:
        """Give the terminal back and flush everything, also after a failure."""
        self.progress.stop()
        self.metrics.close()


def describe(row: StepMetrics) -> str:
    """Describe a step in one line: loss terms, mask rate, speed, fill, and what the students did not cost."""
    seen = row.tokens_student + row.tokens_saved
    saved = f" saved {row.tokens_saved / seen:.0%}" if seen else ""
    return (
        f"{describe_terms(row)}  mask {row.mask_rate:.2f}{saved}  fill {row.pack_fill:.0%}  "
        f"{row.tokens_per_second:,.0f} tok/s"
    )


def describe_terms(terms: MeanTerms) -> str:
    """Return the loss and those of its terms that have loss tokens, as text."""
    labelled = zip(TERMS.values(), terms.values(), strict=True)
    loss, *texts = [f"{label.name} {value:.{label.decimals}f}" for label, value in labelled if value is not None]
    return f"{loss} ({' '.join(texts)})"


def plot_run(folder: Path) -> Path:
    """Draw ``metrics.jsonl`` of the run in ``folder`` as ``training.png``; returns the picture's path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from reflectron.engine.training.metrics import read_rows

    rows = read_rows(folder / "metrics.jsonl")
    steps = [row["step"] for row in rows]

    def series(key: str) -> list[float]:
        # A row that was damaged may lack any of them.
        return [float("nan") if (value := row.get(key)) is None else value for row in rows]

    shared = {term: label for term, label in TERMS.items() if not label.own_axis}
    own = {term: label for term, label in TERMS.items() if label.own_axis}
    figure, (losses, *divergences, schedule) = pyplot.subplots(
        2 + len(own),
        1,
        figsize=(8, 7 + 2 * len(own)),
        sharex=True,
        layout="constrained",
        height_ratios=[3, *(1 for _ in own), 1],
    )
    for term, label in shared.items():
        losses.plot(steps, series(term), label=label.title, linewidth=2 if term == "loss" else 1)
    losses.set_ylabel("nats per token")
    losses.legend()
    for axis, (term, label) in zip(divergences, own.items(), strict=True):
        axis.plot(steps, series(term), color="tab:purple")
        axis.set_ylabel(label.title)
    tokens = zip(series("tokens_saved"), series("tokens_student"), strict=True)
    share = [saved / max(saved + student, 1) for saved, student in tokens]
    schedule.plot(steps, series("mask_rate"), label="mask rate")
    schedule.plot(steps, share, label="share of student tokens saved")
    peak = max([1e-30, *(rate for rate in series("learning_rate") if rate > 0)])
    schedule.plot(steps, [rate / peak for rate in series("learning_rate")], label="learning rate / peak")
    schedule.set_xlabel("step")
    schedule.legend(fontsize="small")
    for axis in (losses, *divergences, schedule):
        axis.grid(alpha=0.3)
    path = folder / "training.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
