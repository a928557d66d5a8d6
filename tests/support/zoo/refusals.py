"""Models of the zoo that are refused, and a part of the message that says why. They train as before."""

_SHAPE = "makes a tensor whose shape depends on the data"

REFUSED: dict[str, str] = {
    "hubert": _SHAPE,
    "loss_ctc": _SHAPE,
    "lstm_packed": "takes arguments no plan can hold: PackedSequence",
    "wav2vec2": _SHAPE,
    "wavlm": _SHAPE,
    "user_checkpoint_reentrant": "When use_reentrant=True",
}

MAY_LACK_A_KERNEL = {("lstm", "bf16"), ("lstm_bidirectional_dropout", "bf16")}
"""Models that the plain step of some processors has no kernel for, so that there is nothing to compare with."""
