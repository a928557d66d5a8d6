"""Reports as tests read them."""

import re


def unwrapped(report: object) -> str:
    """What a report prints, on one line: where it is broken depends on the width."""
    return " ".join(str(report).split())


def without_stages(err: str) -> list[str]:
    """The lines on stderr but for those that say which stage begins."""
    return [line for line in err.splitlines() if not re.match(r"planner: (build|capture|measure|solve|run)\b.* \.\.\.$", line)]
