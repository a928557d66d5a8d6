"""The models, by field; each file's `CASES` holds its own."""

HOMES = tuple(
    f"benchmarks.field.models.{name}"
    for name in (
        "vision",
        "segmentation",
        "diffusion",
        "language",
        "attention",
        "adapters",
        "graphs",
        "science",
        "flows",
        "audio",
        "selfsupervised",
        "metric",
        "quantized",
        "tabular",
        "recurrent",
    )
)
