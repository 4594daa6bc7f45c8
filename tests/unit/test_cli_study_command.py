"""The command on the page of a study: that of the study, not that of the last session."""

import pytest

from brushstroke.cli.study_command import study_command

STUDY = ("study", "rank", "base", "rows.jsonl", "--out", "my out")
PRINTED = "brushstroke study rank base rows.jsonl --out 'my out'"


@pytest.mark.parametrize(
    "session",
    [
        (),
        ("--reread",),
        ("--overwrite",),
        ("--budget-minutes", "7"),
        ("--budget-minutes=7", "--reread"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize(("budget", "flags"), [(None, ""), (110.0, " --budget-minutes 110")])
def test_command_has_the_budget_of_the_plan_and_no_flag_of_one_session(session, budget, flags):
    assert study_command((*STUDY, *session), budget) == PRINTED + flags
    assert study_command((*STUDY[:2], *session, *STUDY[2:]), budget) == PRINTED + flags


def test_other_flags_stay():
    words = (*STUDY, "--png", "--workers", "2", "--reread")
    assert study_command(words, None) == f"{PRINTED} --png --workers 2"
