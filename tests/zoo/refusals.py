"""Models of the zoo that are refused, and a part of the message that says why. They train as before."""

_FUSED = "its fused kernel cannot be captured exactly"
_SHAPE = "makes a tensor whose shape depends on the data"
_KIND = "the graph takes an input of a kind that cannot be planned"

REFUSED: dict[str, str] = {
    "batch_norm_momentum_none": "reads a tensor that its own forward changes",
    "detr": "control flow depends on random numbers",
    "embedding_padding_max_norm": _KIND,
    "embedding_sparse": "makes a sparse_coo tensor",
    "gru": _FUSED,
    "hubert": _SHAPE,
    "layer_drop_python_random": "Python's random module",
    "loss_ctc": _SHAPE,
    "lstm": _FUSED,
    "lstm_bidirectional_dropout": _FUSED,
    "lstm_packed": _FUSED,
    "mixtral-eager": _SHAPE,
    "module_hooks": "has a hook, which would be called while tracing only",
    "moe_loop": _SHAPE,
    "python_counter": "the model's forward changes its attribute",
    "teacher_no_grad": "the forward writes into the parameter",
    "tensor_outputs": _KIND,
    "wav2vec2": _SHAPE,
    "wavlm": _SHAPE,
    "user_checkpoint_reentrant": "When use_reentrant=True",
}
