"""muse-train report: a run's curves as one picture, and whether they are normal (steps 5 to 7).

    muse-train report runs/imagenet                       (RUN/report.png, and a verdict)
    muse-train report runs/a runs/b output=compare.png    (several on top of each other)

Works while a run goes on. Exit status: 0 normal, 1 something is not, 2 no such run.
(`python -m train_stage.report` is the same.)
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from configs.load import ConfigError, load_command_config
from train_stage.reporting.checks import check_run, verdict
from train_stage.reporting.figure import draw_report
from train_stage.reporting.history import read_history


@dataclass
class ReportConfig:
    """Options of muse-train report, beside the run directories."""

    runs: list[str] = field(default_factory=list)
    """The run directories; words without "=" are added to them."""
    output: str | None = None
    """The PNG; null is report.png in the first run directory."""


def main(argv: list[str] | None = None) -> int:
    """Reports; returns 0 when normal, 1 when something is not, 2 when there is nothing to read."""
    words = sys.argv[1:] if argv is None else argv
    paths = [word for word in words if "=" not in word and not word.startswith("-")]
    options = [word for word in words if word not in paths]
    config = load_command_config(ReportConfig, options, __doc__ or "")
    try:
        return report([Path(run) for run in [*paths, *config.runs]], config.output)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def report(runs: list[Path], output: str | None = None) -> int:
    """Prints the findings of each run, draws all of them; 1 when a check of one failed."""
    if not runs:
        raise ConfigError("which run? muse-train report RUN [RUN2 …] [output=…]")
    histories = [read_history(run) for run in runs]
    findings = [check_run(history) for history in histories]
    for run, mine in zip(runs, findings, strict=True):
        print(run)
        print("\n".join(f"  {finding}" for finding in mine))
        print(f"  verdict: {verdict(mine)}\n")
    picture = Path(output) if output else runs[0] / "report.png"
    draw_report(histories, findings, picture)
    print(f"picture: {picture}")
    return int(any(finding.level == "bad" for mine in findings for finding in mine))


if __name__ == "__main__":
    sys.exit(main())
