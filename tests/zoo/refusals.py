"""Models of the zoo that are refused, and a part of the message that says why."""

_SHAPE = "makes a tensor whose shape depends on the data"
_FUSED = "its fused kernel cannot be captured exactly"

REFUSED: dict[str, str] = {
    "lstm": _FUSED,
}
