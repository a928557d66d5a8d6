"""Models of the zoo that are refused, and a part of the message that says why. They train as before."""

_SHAPE = "makes a tensor whose shape depends on the data"

REFUSED: dict[str, str] = {
    "hubert": _SHAPE,
    "loss_ctc": _SHAPE,
    "lstm_packed": "takes arguments no plan can hold: PackedSequence",
    "wav2vec2": _SHAPE,
    "wavlm": _SHAPE,
    "user_checkpoint_reentrant": "own activation checkpointing off",
}

FILLED_BY_THE_FIRST_CALL = {
    *("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"),  # install hooks that record the router's outputs
    "segformer",  # installs hooks that record hidden states
}
"""Models whose first call changes what the forward reads: that call runs unplanned, with a warning."""

MAY_LACK_A_KERNEL = {("lstm", "bf16"), ("lstm_bidirectional_dropout", "bf16")}
"""Models that the plain step of some processors has no kernel for, so that there is nothing to compare with."""
