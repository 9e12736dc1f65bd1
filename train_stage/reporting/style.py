"""How the report looks: colours, type, and how numbers are written."""

from typing import Any

INK, FAINT, GRID = "#1d2433", "#7a8296", "#e7e9f0"
ACCENT = "#4353d0"
COLORS = ("#4353d0", "#e4572e", "#17967f", "#b0419c", "#d99a1c", "#5b6b7f")  # of runs
LEVELS = {"ok": "#17967f", "look": "#d99a1c", "bad": "#d03a3a", "-": "#b9bfcc"}
STYLE: Any = {  # matplotlib's rcParams
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": "#c9cedb",
    "axes.labelcolor": FAINT,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlepad": 22,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": "#c9cedb",
    "ytick.color": "#c9cedb",
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "lines.linewidth": 1.8,
    "legend.frameon": True,
    "legend.facecolor": "white",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 8.6,
    "legend.labelcolor": INK,
}


def count(value: float) -> str:
    """1234567 as 1.23 M."""
    for unit in ("", " k", " M"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} G"


def percent(value: float, _: int | None = None) -> str:
    """A tick of an axis of shares."""
    return f"{100 * value:.4g} %"


def stamp(key: str, value: float) -> str:
    """A metric as people write it."""
    if key in ("accuracy", "mfu", "data_wait"):
        return f"{value:.1%}"
    return f"{value:.3f}" if "loss" in key else count(value)
