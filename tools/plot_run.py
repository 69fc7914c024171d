"""``metrics.jsonl`` -> ``training.png``: loss terms above, what the schedule did below."""

from __future__ import annotations

from pathlib import Path

_TERMS = {"loss": "loss", "ce_teacher": "CE teacher", "ce_student": "CE student", "ce_generation": "CE generation"}


def plot_run(folder: Path) -> Path:
    """Draw the run in ``folder``; returns the picture's path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from reflectron.engine.training.metrics import read_rows

    rows = read_rows(folder / "metrics.jsonl")
    steps = [row["step"] for row in rows]

    def series(key: str) -> list[float]:
        # A row that was damaged may lack any of them.
        return [float("nan") if (value := row.get(key)) is None else value for row in rows]

    figure, (losses, divergence, schedule) = pyplot.subplots(
        3, 1, figsize=(8, 9), sharex=True, layout="constrained", height_ratios=[3, 1, 1]
    )
    for key, label in _TERMS.items():
        losses.plot(steps, series(key), label=label, linewidth=2 if key == "loss" else 1)
    losses.set_ylabel("nats per token")
    losses.legend()
    divergence.plot(steps, series("kl"), color="tab:purple")
    divergence.set_ylabel("KL teacher to student")
    tokens = zip(series("tokens_saved"), series("tokens_student"), strict=True)
    share = [saved / max(saved + student, 1) for saved, student in tokens]
    schedule.plot(steps, series("mask_rate"), label="mask rate")
    schedule.plot(steps, share, label="share of student tokens saved")
    peak = max([1e-30, *(rate for rate in series("learning_rate") if rate > 0)])
    schedule.plot(steps, [rate / peak for rate in series("learning_rate")], label="learning rate / peak")
    schedule.set_xlabel("step")
    schedule.legend(fontsize="small")
    for axis in (losses, divergence, schedule):
        axis.grid(alpha=0.3)
    path = folder / "training.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
