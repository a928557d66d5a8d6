"""Reports as tests read them."""


def unwrapped(report: object) -> str:
    """What a report prints, on one line: where it is broken depends on the width."""
    return " ".join(str(report).split())
