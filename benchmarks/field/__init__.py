"""Models of public packages, trained planned and plain side by side: does anything differ?

Install and run (about five seconds a row, one row at a time; records that exist are kept, so a run that stopped goes on):

    python3 -m venv .venv-field
    .venv-field/bin/pip install -c constraints.txt -c benchmarks/field/constraints.txt -e '.[dev,examples,field]'
    .venv-field/bin/python -m benchmarks.field
    .venv-field/bin/python -m benchmarks.field --only timm diffusers/unet --again
    .venv-field/bin/python -m benchmarks.field --table

The same as a test, with its limits: python -m pytest -n 0 -m field.

Each model has a tiny configuration with random weights; nothing is downloaded. `case.py` says what a model declares,
`check.py` how one is judged, and the folder `models` holds them by field.
"""
