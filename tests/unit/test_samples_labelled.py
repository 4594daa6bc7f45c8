import json

import pytest

from brushstroke.samples import labelled, labelled_file

XML = """<AddressCollection>
  <AddressString><AddressNumber>12</AddressNumber> <StreetName>Main</StreetName>
    <StreetName>St,</StreetName> <PlaceName>Spring&amp;field,</PlaceName></AddressString>
  <AddressString><AddressNumber>7</AddressNumber> <NotAddress>,</NotAddress></AddressString>
  <AddressString><StreetName>7</StreetName> <NotAddress>,</NotAddress></AddressString>
  <AddressString>  </AddressString>
</AddressCollection>
"""


def test_words_of_a_label_are_joined_and_commas_at_the_end_left_out(tmp_path):
    (tmp_path / "labelled.xml").write_text(XML, "utf-8")
    lines = labelled.labelled_lines(tmp_path / "labelled.xml")
    assert lines["12 Main St, Spring&field,"] == {
        "AddressNumber": "12",
        "StreetName": "Main St",
        "PlaceName": "Spring&field",
    }


def test_a_line_counts_once_with_its_first_labels(tmp_path):
    (tmp_path / "labelled.xml").write_text(XML, "utf-8")
    lines = labelled.labelled_lines(tmp_path / "labelled.xml")
    assert list(lines) == ["12 Main St, Spring&field,", "7 ,"]
    assert lines["7 ,"] == {"AddressNumber": "7"}


@pytest.mark.model
@pytest.mark.parametrize(("name", "distinct"), [("addresses", 1488), ("people", 2114), ("companies", 766)])
def test_the_real_rows(name, distinct):
    file = labelled_file(name)
    task, shorter = labelled.read_task(name, file), labelled.read_task(name, file, held_out=40)
    assert len(task.training) + len(task.heldout) == distinct
    assert len(task.heldout) >= 40
    assert task.heldout[:40] == shorter.heldout
    prompts = [json.dumps(labelled.prompt_of(row)) for row in (*task.training, *task.heldout)]
    assert len(set(prompts)) == distinct
    for row in task.training:
        parts = json.loads(row["messages"][-1]["content"])
        assert parts
        assert all(isinstance(part, str) and part for part in parts.values())


def test_rows_are_written_as_messages(tmp_path):
    row = labelled.conversation("people", "Ann Lee", {"GivenName": "Ann", "Surname": "Lee"})
    labelled.write_rows([row, row], tmp_path / "deep" / "rows.jsonl")
    lines = (tmp_path / "deep" / "rows.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [row, row]
    assert labelled.line_of(row, "people") == "Ann Lee"
