"""Is this run normal? Every check looks at one thing: what was found, what is expected, what to do.

Losses are in nats a masked code. K codes are told apart, so knowing nothing costs ln K.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from train_stage.reporting.history import History, Series

Level = Literal["ok", "look", "bad", "-"]  # "-": nothing to judge
SPIKE = 5.0  # times the median around it
ENOUGH = 8  # lines, before trends are judged


@dataclass(frozen=True)
class Finding:
    """What one check says."""

    topic: str
    level: Level
    found: str
    expected: str = ""
    advice: str = ""

    def __str__(self) -> str:
        sign = self.level if self.level in "ok-" else self.level.upper()
        expected = f"; expected: {self.expected}" if self.expected else ""
        advice = f" -> {self.advice}" if self.level in ("look", "bad") and self.advice else ""
        return f"{sign:5}{self.topic:16}{self.found}{expected}{advice}"


def check_run(history: History) -> list[Finding]:
    """All findings, in the order in which they are read best."""
    checks = (
        progress,
        finite,
        start_of_loss,
        fall_of_loss,
        shape_by_mask_ratio,
        overfitting,
        averaged_weights,
        gradient,
        data_wait,
        throughput,
        utilisation,
        restarts,
    )
    return [finding for check in checks if (finding := check(history)) is not None]


def verdict(findings: list[Finding]) -> str:
    """One line for all of them."""
    bad, look = ([f.topic for f in findings if f.level == level] for level in ("bad", "look"))
    if bad:
        return f"not normal: {', '.join(bad)}" + (f"; look at {', '.join(look)}" if look else "")
    return f"normal, but look at {', '.join(look)}" if look else "normal"


def short_verdict(findings: list[Finding]) -> tuple[Level, str]:
    """The worst level, and two or three words."""
    levels = [finding.level for finding in findings]
    if "bad" in levels:
        return "bad", "not normal"
    return ("look", f"{levels.count('look')} to look at") if "look" in levels else ("ok", "normal")


def progress(h: History) -> Finding:
    """How far it is, and whether it goes on."""
    done = f"step {h.step:,}" + (f" of {h.total:,}" if h.total else "")
    if h.total and h.step >= h.total:
        return Finding("progress", "-", f"{done}, finished")
    lines = [line for line in h.lines if "time" in line][-20:]
    pace = 0.0  # seconds a step
    if lines and (steps := lines[-1]["step"] - lines[0]["step"]):
        pace = (lines[-1]["time"] - lines[0]["time"]) / steps
    every, age = h.option("experiment.log_every") or 0, h.age_s()
    if age > max(600, 10 * every * pace):
        return Finding("progress", "-", f"{done}, silent for {hours(age)}")
    left = f", about {hours(pace * (h.total - h.step))} left" if h.total and pace else ""
    return Finding("progress", "-", f"{done}, running{left}")


def finite(h: History) -> Finding:
    """NaN and infinity."""
    scaled = h.option("training.mixed_precision") == "fp16"  # steps too large are skipped
    for line in h.lines:
        for key, value in line.items():
            if key == "grad_norm" and scaled:
                continue
            if isinstance(value, int | float) and not np.isfinite(value):
                found = f"{key} is {value} at step {line['step']}"
                advice = "a lower optimizer.params.learning_rate; bf16 instead of fp16"
                return Finding("numbers", "bad", found, "none", advice)
    return Finding("numbers", "ok", "all finite")


def start_of_loss(h: History) -> Finding | None:
    """Guessing, at first."""
    loss, guess = h.series("cross_entropy"), h.guessing
    if guess is None or not len(loss):
        return None
    step, value = int(loss.steps[0]), loss.values[0]
    found, expected = f"{value:.2f} at step {step}", f"ln {np.exp(guess):,.0f} = {guess:.2f}"
    if h.option("model.pretrained_model_path"):
        return Finding("start", "-", f"{found}, from weights that were trained before", expected)
    advice = "a smaller model.transformer.initializer_range: its first guesses are too sure"
    if value > guess + 0.5:
        return Finding("start", "bad" if value > 1.5 * guess else "look", found, expected, advice)
    if step == 1 and value < 0.85 * guess:
        advice = "does the input give the codes away? masks, labels, pretrained weights"
        return Finding("start", "bad", found, f"{expected}, not less", advice)
    return Finding("start", "ok", found, expected)


def fall_of_loss(h: History) -> Finding | None:
    """Down, and not up again."""
    loss = h.loss
    if len(loss) < ENOUGH:
        return Finding("fall", "-", f"{len(loss)} log lines: too few to tell")
    first, last = np.median(loss.values[: max(1, len(loss) // 10)]), np.median(loss.last(0.1))
    third, fourth = np.array_split(loss.last(0.5), 2)
    change, error = fourth.mean() - third.mean(), noise(loss.values) * np.sqrt(4 / len(third))
    found = f"{first:.3f} -> {last:.3f}, {change:+.3f} in the last quarter"
    rate = "a lower optimizer.params.learning_rate, a longer warm-up"
    if last > first - max(0.005 * first, error):
        advice = f"{rate}; training.overfit_one_batch=true must reach 0"
        return Finding("fall", "bad", found, "down", advice)
    if change > max(3 * error, 0.005 * last):
        return Finding("fall", "bad", found, "not up again", rate)
    return Finding("fall", "ok", found, "down")


def shape_by_mask_ratio(h: History) -> Finding | None:
    """The more is hidden, the harder."""
    shape = current_shape(h)
    if len(shape) < 2:
        return None
    loss = h.loss.values
    ratios, means = list(shape), [mean for mean, _ in shape.values()]
    found = f"{means[0]:.2f} with {ratios[0]:.0%} hidden, {means[-1]:.2f} with {ratios[-1]:.0%}"
    if len(loss) < ENOUGH or np.median(loss[-ENOUGH:]) > 0.95 * loss[0]:
        return Finding("mask ratios", "-", f"{found}; it has learned too little to tell")
    for low, high in zip(ratios, ratios[1:], strict=False):
        (below, error), (above, other) = shape[low], shape[high]
        if below - above > max(0.05 * below, 4 * np.hypot(error, other)):
            advice = "more hidden should be harder: look at mask_schedule and at rare ratios"
            odd = f"{below:.2f} with {low:.0%} hidden, but {above:.2f} with {high:.0%}"
            return Finding("mask ratios", "look", odd, "rising", advice)
    return Finding("mask ratios", "ok", found, "rising all the way")


def current_shape(h: History) -> dict[float, tuple[float, float]]:
    """Mask ratio -> (loss, its standard error) over the last quarter, at least 20 lines."""
    shape, share = {}, max(0.25, min(1.0, 20 / len(h.loss)))
    for ratio, series in h.by_mask_ratio().items():
        values = series.last(share)
        error = values.std() / np.sqrt(len(values)) if len(values) > 1 else np.inf
        shape[ratio] = (float(values.mean()), float(error))
    return shape


def overfitting(h: History) -> Finding:
    """Rows that were never trained on cost about as much as the others."""
    unseen, train = h.series("eval_loss"), h.loss
    if not len(unseen):
        return Finding("validation", "-", "none: dataset.eval_store=… has the rows for it")
    seen = smooth_at(train, int(unseen.steps[-1]))
    best = int(unseen.values.argmin())
    last, rise = unseen.values[-1], unseen.values[-1] - unseen.values[best]
    found = f"{last:.3f} on unseen rows, {seen:.3f} in training"
    advice = "more rows, more dropout or weight decay, fewer steps; keep the checkpoint of then"
    if rise > 0.01 * last and best < len(unseen) - 2:
        found += f"; it was {unseen.values[best]:.3f} at step {unseen.steps[best]:,}"
        return Finding("validation", "bad" if rise > 0.05 * last else "look", found, "", advice)
    if last - seen > 0.1 * seen:
        return Finding("validation", "look", found, "a gap below 10 %", advice)
    return Finding("validation", "ok", found, "a gap below 10 %, no rise")


def averaged_weights(h: History) -> Finding | None:
    """The moving average should be at least as good."""
    averaged, trained = h.series("eval_loss_ema"), h.series("eval_loss")
    if not len(averaged):
        return None
    mine, theirs = averaged.values[-1], trained.values[-1]
    found = f"{mine:.3f} by the moving average, {theirs:.3f} as trained"
    advice = "they lag behind: a smaller training.ema.decay, or wait"
    level: Level = "ok" if mine <= 1.005 * theirs else "look"
    return Finding("averaged", level, found, "averaged not worse", advice)


def gradient(h: History) -> Finding | None:
    """Its norm keeps its size."""
    norm = h.series("grad_norm")
    if len(norm) < ENOUGH:
        return None
    spikes = norm.steps[norm.values > SPIKE * running_median(norm.values)]
    second, last = np.median(np.array_split(norm.values, 4)[1]), np.median(norm.last(0.25))
    found = f"norm {last:.2g}, {len(spikes)} spikes in {len(norm)} lines"
    if limit := h.option("training.max_grad_norm"):
        found += f", {np.mean(norm.last(0.25) > limit):.0%} of late ones clipped at {limit:g}"
    rate = "a lower learning rate, optimizer.params.beta2=0.95, a smaller max_grad_norm"
    if last > 3 * second:
        return Finding("gradient", "look", f"{found}, {last / second:.1f} x as large", "", rate)
    if len(spikes) > max(1, 0.01 * len(norm)):
        steps = ", ".join(f"{step:,}" for step in spikes[-3:])
        return Finding("gradient", "look", f"{found} (steps {steps})", "below 1 %", rate)
    return Finding("gradient", "ok", found, "spikes in less than 1 %")


def data_wait(h: History) -> Finding | None:
    """The loader is never what one waits for."""
    waits = h.speed("data_wait").values
    if not len(waits):
        return None
    wait = float(np.median(waits))
    if len(waits) < 2:  # it may be that of the first batch
        return Finding("data wait", "-", f"{wait:.2%} of the time in the one log line")
    level: Level = "ok" if wait < 0.005 else "look" if wait < 0.05 else "bad"
    advice = "dataset.preload=ram or gpu, the store on a local disk, a larger batch"
    found = f"{wait:.2%} of the time, at worst {waits.max():.2%}"
    return Finding("data wait", level, found, "below 0.5 %", advice)


def throughput(h: History) -> Finding | None:
    """As fast at the end as at the start."""
    speed = h.speed("images_per_s")
    if not len(speed):
        return None
    usual = float(np.median(speed.values))
    slow = speed.steps[speed.values < 0.7 * usual]
    found = f"{usual:,.4g} images/s, {len(slow)} of {len(speed)} lines below 70 % of it"
    advice = "who else uses the machine? clocks and temperature (nvidia-smi -q -d PERFORMANCE)"
    if len(speed) >= ENOUGH:
        quarters = [np.median(part) for part in np.array_split(speed.values, 4)]
        if quarters[-1] < 0.85 * max(quarters):
            found += f"; {quarters[-1] / max(quarters):.0%} of the best quarter lately"
            return Finding("speed", "look", found, "", advice)
    level: Level = "look" if len(slow) > max(1, 0.05 * len(speed)) else "ok"
    return Finding("speed", level, found, "steady", advice)


def utilisation(h: History) -> Finding | None:
    """What the machine could do."""
    shares = h.speed("mfu").values
    if not len(shares) or not h.starts:
        return None
    share, of = float(np.median(shares)), h.starts[-1]["mfu_of"]
    memory = h.speed("peak_memory_gb").values.max(initial=0)
    found = f"{share:.1%} of {of}; {memory:.3g} GB at most"
    if "measured" in of:
        return Finding("MFU", "-", found)
    level: Level = "ok" if share >= 0.4 else "look" if share >= 0.2 else "bad"
    advice = "training.mixed_precision=bf16, training.compile=true, a larger training.batch_size"
    return Finding("MFU", level, found, "40 % and more from 300 M parameters on", advice)


def restarts(h: History) -> Finding | None:
    """A run that went on goes on where it was."""
    if not h.restarts:
        return None
    loss = h.loss
    found = f"{len(h.restarts)}, at step {', '.join(f'{step:,}' for step in h.restarts[-5:])}"
    for step in h.restarts:
        before, after = loss.values[loss.steps <= step][-10:], loss.after(step).values[:10]
        if len(before) < 3 or len(after) < 3:
            continue
        error = noise(loss.values) * np.sqrt(1 / len(before) + 1 / len(after))
        if (jump := after.mean() - before.mean()) > max(4 * error, 0.01 * before.mean()):
            advice = "the same options as before? the console says which have changed"
            return Finding(
                "restarts", "bad", f"{found}; +{jump:.2f} after {step:,}", "no jump", advice
            )
    return Finding("restarts", "ok", found, "no jump of the loss")


def noise(values: np.ndarray) -> float:
    """The standard deviation around a slow trend, from neighbours' differences."""
    return float(np.diff(values).std() / np.sqrt(2)) if len(values) > 2 else 0.0


def running_median(values: np.ndarray, width: int = 51) -> np.ndarray:
    """The median of up to `width` values around each."""
    half = width // 2
    return np.array(
        [np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    )


def smooth_at(series: Series, step: int) -> float:
    """The mean of the last tenth of what was logged until `step`."""
    until = series.values[series.steps <= step]
    return float(until[-max(1, len(until) // 10) :].mean()) if len(until) else float("nan")


def hours(seconds: float) -> str:
    """1:23 h, or minutes."""
    minutes = int(seconds) // 60
    return f"{minutes // 60}:{minutes % 60:02} h" if minutes >= 60 else f"{minutes} min"
