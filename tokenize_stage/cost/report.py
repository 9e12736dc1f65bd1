"""A forecast in words and tables, as muse-tokenize estimate prints it."""

from collections.abc import Mapping

from tokenize_stage.cost.forecast import Forecast, Measured


def describe(
    result: Forecast,
    measured: Measured,
    encoders: Mapping[str, float],
    basis: str,
    gpus: int,
) -> str:
    """encoders: way to encode -> rows/s, the one that was forecast first; basis: of the count."""
    lines = [f"{'stage':<10} {'images/s':>12}"]
    for name, rate in result.stages.items():
        note = {
            "read": f"one thread, {rate * measured.bytes_per_sample / 1e6:,.0f} MB/s",
            "decode": f"{result.cores} cores, {measured.core_s_per_sample * 1e3:.2f} ms each",
            "encode": next(iter(encoders)),
        }.get(name, "one thread")
        bounds = "  <- the slowest" if name == result.bound_by else ""
        lines.append(f"{name:<10} {rate:>12,.1f}  {note}{bounds}")
    (_, forecast_rate), *others = encoders.items()
    for name, rows_per_s in others:
        rate = result.stages["encode"] * rows_per_s / forecast_rate
        lines.append(f"{'':<10} {rate:>12,.1f}  {name}, instead")
    lines += ["", *_run_lines(result, measured, basis, gpus), "", *_size_lines(result)]
    return "\n".join(lines)


def _run_lines(result: Forecast, measured: Measured, basis: str, gpus: int) -> list[str]:
    of_views = f" in {measured.views} views" if measured.views > 1 else ""
    rejected = f", {1 - measured.accepted:.1%} rejected" if measured.accepted < 1 else ""
    input_per_s = result.images_per_s * gpus * measured.bytes_per_sample
    rows = [
        ("images", f"{result.images:,} ({basis})"),
        ("rows", f"{result.rows:,}{of_views}{rejected}"),
        ("images/s a GPU", f"{result.images_per_s:,.1f}, bound by {result.bound_by}"),
        ("cores a GPU", f"{result.cores_needed:,.1f} keep one busy, {result.cores} are there"),
        ("GPU-hours", f"{result.gpu_hours:,.2f}"),
        ("wall time", f"{_duration(result.wall_hours)} on {gpus:,} GPU{'s' * (gpus > 1)}"),
        ("input", f"{_size(result.read_bytes)}, {_size(input_per_s)}/s while it runs"),
    ]
    if result.money is not None:
        rows.append(("money", f"{result.money:,.2f}"))
    return [f"{name:<16} {value}" for name, value in rows]


def _size_lines(result: Forecast) -> list[str]:
    whole = sum(result.bytes.values())
    lines = [f"{'on disk':<22} {'bytes a row':>12} {'in all':>12}"]
    for name, size in [*result.bytes.items(), ("all", whole)]:
        lines.append(f"{name:<22} {size / max(1, result.rows):>12,.1f} {_size(size):>12}")
    return lines


def _size(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:,.2f} {unit}" if unit != "bytes" else f"{size:.0f} bytes"


def _duration(hours: float) -> str:
    """Hours as days, hours and minutes, or seconds where there are few."""
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    days, minutes = divmod(round(hours * 60), 24 * 60)
    return f"{days} d " * (days > 0) + f"{minutes // 60} h {minutes % 60} min"
