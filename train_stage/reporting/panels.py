"""The panels of the report's picture, each drawn into the axes it is given, for one run or many."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import FuncFormatter, MaxNLocator

from train_stage.reporting.checks import running_median
from train_stage.reporting.history import History, Series, smooth
from train_stage.reporting.style import COLORS, FAINT, INK, count, percent

SECOND = COLORS[1]
RATIO_COLORS = ("#f4bd6a", "#d9486e", "#5b2a86", "#171040")


def loss(axes: Axes, histories: list[History]) -> None:
    """Training and validation loss, and what guessing costs."""
    points = "" if len(histories) == 1 else "; points: validation"
    head(axes, "Loss", f"nats a hidden code; light: every log line, bold: smoothed{points}")
    guesses = {round(h.guessing, 6) for h in histories if h.guessing is not None}
    for guess in guesses:
        axes.axhline(guess, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
        words = f"guessing: ln {math.exp(guess):,.0f} = {guess:.2f}"
        axes.annotate(
            words, (1, guess), (0, 4), ("axes fraction", "data"), "offset points", ha="right",
            color=FAINT, fontsize=8.6,
        )  # fmt: skip
    for color, history in colored(histories):
        name = history.name if len(histories) > 1 else "training"
        trace(axes, history.loss, color, name)
        unseen, averaged = history.series("eval_loss"), history.series("eval_loss_ema")
        mine = SECOND if len(histories) == 1 else color
        if len(unseen):
            axes.plot(unseen.steps, unseen.values, "o-", color=mine, markersize=4, linewidth=1.2,
                      label="validation" if len(histories) == 1 else None)  # fmt: skip
        if len(averaged) and len(histories) == 1:
            axes.plot(averaged.steps, averaged.values, "D--", color=COLORS[2], markersize=3.5,
                      linewidth=1.2, label="validation, averaged weights")  # fmt: skip
        mark_restarts(axes, history, color)
    values = np.concatenate([h.loss.values for h in histories])
    top = max([*guesses, float(np.nanpercentile(values, 99.5))])
    bottom = float(np.nanmin(values))
    axes.set_ylim(bottom - 0.06 * (top - bottom), top + 0.09 * (top - bottom))
    axes.legend(loc="lower left")


def loss_by_mask_ratio(axes: Axes, histories: list[History]) -> None:
    """A curve for every tenth of the mask ratio; of several runs the easiest and the hardest."""
    if len(histories) > 1:
        head(axes, "Loss by mask ratio", "nats; solid: the most hidden, dotted: the least")
        for color, history in colored(histories):
            found = list(history.by_mask_ratio().values())
            for series, line in zip(found[:1] + found[-1:], (":", "-"), strict=False):
                axes.plot(series.steps, steady(series), color=color, linestyle=line)
        return
    head(axes, "Loss by mask ratio", "nats, a curve for every tenth of the codes hidden")
    colors = LinearSegmentedColormap.from_list("ratios", RATIO_COLORS)
    for ratio, series in histories[0].by_mask_ratio().items():
        axes.plot(series.steps, steady(series), color=colors(ratio), linewidth=1.5)
    bar = axes.inset_axes((0.52, 0.9, 0.46, 0.045))
    bar.imshow(np.linspace(0, 1, 64)[None], aspect="auto", cmap=colors, extent=(0, 1, 0, 1))
    bar.set(yticks=[], xticks=[0.02, 0.98], xticklabels=["few hidden", "all"])
    bar.tick_params(length=0, labelsize=8, pad=2)
    bar.grid(False)
    bar.spines[:].set_visible(False)


def shape(axes: Axes, histories: list[History]) -> None:
    """Loss against mask ratio: early, later, now."""
    head(axes, "What it knows", "loss (nats) by share of hidden codes, should rise")
    for color, history in colored(histories):
        moments = (1.0, 0.66, 0.33) if len(histories) == 1 else (1.0,)
        for moment in moments:
            step = moment * history.step
            points = {}
            for ratio, series in history.by_mask_ratio().items():
                until = series.values[series.steps <= step]
                if len(until):
                    points[ratio] = until[-max(1, len(until) // 4) :].mean()
            label = "now" if moment == 1 else f"at step {count(int(step))}"
            axes.plot(list(points), list(points.values()), "o-", color=color, label=label,
                      alpha=moment**1.6, markersize=4 if moment == 1 else 0)  # fmt: skip
        fixed = {ratio: series.values[-1] for ratio, series in history.by_eval_ratio().items()}
        if fixed:
            mine, words = (SECOND, "validation") if len(histories) == 1 else (color, None)
            axes.plot(list(fixed), list(fixed.values()), "s", color=mine, label=words, markersize=5)
    axes.xaxis.set_major_formatter(FuncFormatter(percent))
    axes.set_xlim(0, 1)
    if len(histories) == 1:
        axes.legend(loc="best")


def accuracy(axes: Axes, histories: list[History]) -> None:
    """How often the likeliest code is the right one."""
    head(axes, "Accuracy", "share of hidden codes guessed right")
    for color, history in colored(histories):
        trace(axes, history.series("accuracy"), color)
        unseen = history.series("eval_accuracy")
        mine = SECOND if len(histories) == 1 else color
        axes.plot(unseen.steps, unseen.values, "o-", color=mine, markersize=4, linewidth=1.2)
    axes.yaxis.set_major_formatter(FuncFormatter(percent))
    axes.set_ylim(bottom=0)


def gradient(axes: Axes, histories: list[History]) -> None:
    """Its norm before clipping."""
    head(axes, "Gradient norm", "before clipping; dashes: training.max_grad_norm")
    for color, history in colored(histories):
        middle(axes, history.series("grad_norm"), color)
        if limit := history.option("training.max_grad_norm"):
            axes.axhline(limit, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yscale("log")
    for side in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        side(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "125" else ""))
    axes.tick_params(which="minor", length=0)


def learning_rate(axes: Axes, histories: list[History]) -> None:
    """As the schedule has it, and the decay of the moving average."""
    head(axes, "Learning rate", "as scheduled")
    for color, history in colored(histories):
        rate = history.series("learning_rate")
        axes.plot(rate.steps, rate.values, color=color)
        axes.fill_between(rate.steps, rate.values, color=color, alpha=0.08, linewidth=0)
        decay = history.series("ema_decay")
        if len(decay) and len(histories) == 1:
            head(axes, "Learning rate", "as scheduled; dots: decay of the averaged weights (right)")
            right = axes.twinx()
            right.plot(decay.steps, decay.values, ":", color=COLORS[2], linewidth=1.4)
            right.grid(False)
            right.set_ylim(top=1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(bottom=0)


def speed(axes: Axes, histories: list[History]) -> None:
    """Images a second."""
    head(axes, "Throughput", "images/s")
    top = 0.0
    for color, history in colored(histories):
        rate = history.warm("images_per_s")
        middle(axes, rate, color)
        mark_restarts(axes, history, color)
        top = max(top, float(np.nanpercentile(rate.values, 98)) if len(rate) else 0.0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.set_ylim(0, 1.15 * top or 1)
    tokens = histories[-1].speed("tokens_per_s").values
    if len(histories) == 1 and len(tokens):
        note(axes, f"{count(float(np.median(tokens)))} tokens/s")


def utilisation(axes: Axes, histories: list[History]) -> None:
    """What the matrix units did of what they could."""
    head(axes, "MFU", "the model's FLOPs, of what the machine could do")
    for color, history in colored(histories):
        middle(axes, history.warm("mfu"), color)
    axes.yaxis.set_major_formatter(FuncFormatter(percent))
    axes.set_ylim(bottom=0)
    if histories[-1].starts and len(histories) == 1:
        note(axes, f"of {histories[-1].starts[-1]['mfu_of']}")


def stall(axes: Axes, histories: list[History]) -> None:
    """Time in which nothing was computed for want of codes."""
    head(axes, "Data stall", "share of the time that steps wait for codes; dashes: 0.5 %")
    for color, history in colored(histories):
        share = history.warm("data_wait")
        middle(axes, Series(share.steps, np.maximum(share.values, 1e-5)), color)
    axes.axhline(0.005, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(percent))
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 1e-4), max(high, 0.1))
    memory = histories[-1].speed("peak_memory_gb").values
    if len(histories) == 1 and len(memory):
        note(axes, f"memory: {memory.max():.3g} GB at most")


def head(axes: Axes, title: str, subtitle: str) -> None:
    """Title, a line on how to read the panel, and steps below."""
    axes.set_title(title, loc="left")
    for text in list(axes.texts):
        text.remove()
    axes.annotate(
        subtitle, (0, 1), (0, 8), "axes fraction", "offset points", color=FAINT, fontsize=8.8
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.margins(x=0.01)


def note(axes: Axes, text: str) -> None:
    """A few words in the corner below."""
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
    at: Any = {"transform": axes.transAxes, "ha": "right", "va": "bottom"}
    axes.text(0.985, 0.035, text, color=INK, fontsize=8.4, bbox=box, **at)


def middle(axes: Axes, series: Series, color: str) -> None:
    """Every line lightly, the running median over it."""
    width = max(3, len(series) // 15) | 1
    axes.plot(series.steps, series.values, color=color, linewidth=0.8, alpha=0.35)
    axes.plot(series.steps, running_median(series.values, width), color=color)


def steady(series: Series) -> np.ndarray:
    """Smoothed more than the loss: a tenth of the images is in each."""
    return smooth(series.values, max(0.03, min(0.1, 2 / max(1, len(series)))))


def trace(axes: Axes, series: Series, color: str, label: str | None = None) -> None:
    """Every line lightly, the trend over it."""
    axes.plot(series.steps, series.values, color=color, linewidth=0.8, alpha=0.3)
    axes.plot(series.steps, smooth(series.values), color=color, linewidth=2.2, label=label)


def mark_restarts(axes: Axes, history: History, color: str) -> None:
    """A small triangle where a run went on."""
    for index, step in enumerate(history.restarts):
        axes.plot(step, 0, "^", color=color, markersize=6, clip_on=False,
                  transform=axes.get_xaxis_transform(), zorder=5,
                  label="went on after a stop" if index == 0 else None)  # fmt: skip


def colored(histories: list[History]) -> list[tuple[str, History]]:
    """Each with the colour it has in all panels."""
    return [(COLORS[index % len(COLORS)], history) for index, history in enumerate(histories)]
