"""What `--json` prints: every command's output is of the documented schema, and the page says what the schema says."""

import json

import pytest
from jsonschema import Draft202012Validator

from planner.cli import main
from planner.results import plan_file
from planner.results.figures import JSON_SCHEMA
from tests.support import graphs
from tests.support.models import MODEL_FILE
from tests.support.paths import ROOT

SCHEMA = json.loads((ROOT / "docs" / "json-schema.json").read_text(encoding="utf-8"))
KINDS = ("plan", "explanation", "sweep", "max-batch", "estimate", "diagnosis", "cache")
FAST = ["--costs", "estimate", "--effort", "0.2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("json")
    (folder / "my_model.py").write_text(MODEL_FILE)
    (folder / "blocks.json").write_text(plan_file.dumps(graphs.blocks(8)))
    return folder


def printed(capsys, folder, arguments, code=0):
    """The object that a command prints, which is all that it prints, checked."""
    given = [argument.format(folder=folder, model=folder / "my_model.py") for argument in arguments]
    assert main([*given, "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    Draft202012Validator({**SCHEMA["$defs"][found["kind"]], "$defs": SCHEMA["$defs"]}).validate(found)
    return found


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["solve", "{folder}/blocks.json", "--budget", "0.7", "--save", "{folder}/plan.json"], "plan"),
        (["solve", "{folder}/blocks.json", "--sweep", "3", "--save", "{folder}/sweep.json"], "sweep"),
        (["show", "{folder}/plan.json"], "plan"),
        (["show", "{folder}/sweep.json"], "sweep"),
        (["explain", "{folder}/plan.json", "--effort", "0.2"], "explanation"),
        (["plan", "{model}:build", "--budget", "0.7", "--verify", *FAST], "plan"),
        (["export", "{model}:build", "--budget", "0.7", "-o", "{folder}/out_model.py", *FAST], "plan"),
        (["sweep", "{model}:build", "--points", "2", "--verify", "1", *FAST], "sweep"),
        (["explain", "{model}:build", "--budget", "0.7", *FAST], "explanation"),
        (["max-batch", "{model}:sized", "--budget", "1MiB", "--verify", *FAST], "max-batch"),
        (["estimate", "{model}:build", "--memory", "1.5MiB", *FAST], "estimate"),
        (["estimate", "{model}:build", "--device", "H100", *FAST], "estimate"),
        (["doctor", "{model}:build"], "diagnosis"),
        (["cache", "--info"], "cache"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]),
)
def test_every_command_prints_what_is_documented(arguments, kind, files, capsys):
    found = printed(capsys, files, arguments)
    assert (found["schema"], found["kind"]) == (JSON_SCHEMA, kind)


def test_a_step_that_does_not_fit_is_printed_too(files, capsys):
    found = printed(capsys, files, ["estimate", "{model}:build", "--memory", "8KiB", *FAST], code=1)
    assert found["fits"] is found["fits_planned"] is False and found["missing_bytes"] > 0 and found["why_no_plan"]


def properties(schema, prefix=""):
    """Every field of an object of the schema, with those of objects inside of it that have no name of their own."""
    for name, field in schema["properties"].items():
        yield f"{prefix}{name}", field
        inner, place = (field["items"], f"{prefix}{name}[].") if field.get("type") == "array" else (field, f"{prefix}{name}.")
        inner = next((each for each in inner.get("anyOf", ()) if "properties" in each), inner) if inner else {}
        if "properties" in inner:
            yield from properties(inner, place)


def test_the_page_lists_every_field_with_its_meaning():
    sections = (ROOT / "docs" / "json.md").read_text(encoding="utf-8").split("\n## ")[1:]
    page = {section.partition("\n")[0]: section for section in sections}
    assert page.keys() == SCHEMA["$defs"].keys() and page.keys() >= set(KINDS)
    for name, schema in SCHEMA["$defs"].items():
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page[name].splitlines() if line.startswith("| `")]
        assert {row[0].strip("`"): row[2] for row in rows} == {f: field["description"] for f, field in properties(schema)}


def test_the_schema_itself_is_valid_and_is_of_this_version():
    Draft202012Validator.check_schema(SCHEMA)
    for kind in KINDS:
        schema = SCHEMA["$defs"][kind]
        assert schema["properties"]["schema"]["const"] == JSON_SCHEMA and schema["properties"]["kind"]["const"] == kind
        assert schema["additionalProperties"] is False, "a field that is not documented is an error"
