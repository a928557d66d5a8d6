"""Names that attributes of a CheckpointedModule had in an earlier release."""

from __future__ import annotations

from typing import Any

from planner.errors import warn


class FormerNames:
    """What they are now is returned, with a DeprecationWarning."""

    @property
    def program(self) -> Any:
        """Former name of `executable`; deprecated."""
        warn("CheckpointedModule.program is now called executable", DeprecationWarning)
        return self.executable  # type: ignore[attr-defined]

    def difference(self, args: Any, kwargs: Any) -> Any:
        """Former name of `mismatch`; deprecated."""
        warn("CheckpointedModule.difference is now called mismatch", DeprecationWarning)
        return self.mismatch(args, kwargs)  # type: ignore[attr-defined]
