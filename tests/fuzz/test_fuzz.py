"""Random models with random Python around the kernels: eager's bits, a named mismatch or a named refusal, nothing else."""

import pytest

from tests.fuzz.generate import case_of
from tests.fuzz.runner import Result, result_of, run_case
from tests.support.harness import outcome
from tests.support.itself import itself

FIRST, COUNT, EACH = 0, 192, 24
MANY = 2_000
FIRST_IN_UNITS, COUNT_IN_UNITS = 29, 8
MANY_IN_UNITS = 400


def check(first: int, count: int, *, in_units: bool = False) -> list[Result]:
    """Run consecutive seeds; every failure is told, with how to repeat it."""
    results = [result_of(seed, in_units=in_units) for seed in range(first, first + count)]
    failed = [
        f"python -m tests.fuzz{' --units' * in_units} --seed {r.seed}: {r.verdict}: {r.detail}" for r in results if r.failed
    ]
    assert not failed, "\n".join([f"{len(failed)} of seeds {first} to {first + count - 1}", *failed])
    planned = sum(result.first_planned for result in results)
    assert planned >= count * 0.3, f"seeds {first} to {first + count - 1}: only {planned} of {count} ran planned"
    return results


@pytest.mark.parametrize("first", range(FIRST, FIRST + COUNT, EACH))
def test_random_models(first):
    check(first, EACH)


@pytest.mark.zoo
@pytest.mark.parametrize("first", range(100_000, 100_000 + MANY, 100))
def test_many_random_models(first):
    check(first, 100)


@pytest.mark.parametrize("first", range(FIRST_IN_UNITS, FIRST_IN_UNITS + COUNT_IN_UNITS, 4))
def test_random_models_in_units(first):
    check(first, 4, in_units=True)


@pytest.mark.zoo
@pytest.mark.parametrize("first", range(200_000, 200_000 + MANY_IN_UNITS, 40))
def test_many_random_models_in_units(first):
    check(first, 40, in_units=True)


def test_cases_are_reproducible_and_varied():
    cases = [case_of(seed) for seed in range(300)]
    assert [case.program().source for case in cases] == [case_of(seed).program().source for seed in range(300)]
    groups = {unit.group for case in cases for unit in case.units}
    assert {"setting", "carried tensor", "left tensor", "counter", "cache", "random", "tensor setting"} <= groups
    assert 45 <= sum(case.benign for case in cases) <= 150
    assert len({step.kind for case in cases for step in case.steps}) >= 20


def test_a_plain_model_is_planned():
    """The fuzzer itself finds nothing where there is nothing."""
    plain = [case for case in map(case_of, range(400)) if case.benign and all(unit.group == "layer" for unit in case.units[:2])]
    assert run_case(plain[0]).verdict == "same"


@pytest.mark.one_in(4)
@pytest.mark.parametrize("first", range(0, 400, 100))
def test_cases_show_nothing_against_themselves(first):
    raised = 0
    for seed in range(first, first + 100):
        found = outcome(case_of(seed).program(), make=itself)
        assert found.verdict == "same", seed
        raised += any(found.raised)
    assert raised <= 25  # a case that raises early tests little
