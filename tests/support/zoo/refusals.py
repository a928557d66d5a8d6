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
