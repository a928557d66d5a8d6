PYTHON := .venv/bin/python

.PHONY: install test zoo field lint types site bench bench-compare bench-solver

install:
	python3 -m venv .venv
	$(PYTHON) -m pip install -c constraints.txt -e '.[dev,docs,examples,plot]'

test:
	$(PYTHON) -m pytest

zoo:
	$(PYTHON) -m pytest -m zoo

field:
	$(PYTHON) -m pip install -c constraints.txt -c benchmarks/field/constraints.txt -e '.[dev,examples,plot,field]'
	$(PYTHON) -m pytest -n 0 -m field

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m mypy -p planner

site:
	$(PYTHON) -m mkdocs build --strict

bench:
	$(PYTHON) -m benchmarks.main_job

bench-compare:
	$(PYTHON) -m benchmarks.compare

bench-solver:
	$(PYTHON) -m benchmarks.solver
