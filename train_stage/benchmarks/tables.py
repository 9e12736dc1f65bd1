"""Lines of Markdown tables, and what was to be reached: for every part of train_stage.bench."""

Target = tuple[str, float, float]  # what, measured, at least


def head(*names: str) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]


def line(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def targets(*asked: Target) -> list[str]:
    """What had to be reached, and whether it was; nan was not measured, and fails."""
    return [
        *head("target", "asked", "measured", ""),
        *(at_least(*target) for target in asked),
    ]


def at_least(what: str, value: float, limit: float) -> str:
    """A line of the targets."""
    return line(what, f"≥ {limit:g}", f"{value:.2f}", "pass" if value >= limit else "FAIL")


def at_most(what: str, value: float, limit: float) -> str:
    """A line of the targets."""
    return line(what, f"< {limit:g}", f"{value:.2f}", "pass" if value < limit else "FAIL")
