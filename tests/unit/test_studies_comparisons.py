"""Arms over seeds as blocks, against scipy and a least-squares fit; and the claims made from them."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from brushstroke.errors import ConfigError
from brushstroke.studies import RankStudy, TargetsStudy
from brushstroke.studies.comparisons import (
    DUNNETT,
    MARGIN,
    TUKEY,
    TUKEY_LEVEL,
    RowLosses,
    compare_all,
    compare_with,
    dunnett_p,
    mean_on_new_rows,
    own_variances,
    pair_errors,
    row_errors,
    tukey_p,
)
from brushstroke.studies.statistics import interval
from brushstroke.studies.tables import as_comparison

ROOT = Path(__file__).parents[2]
ARMS = ("a", "b", "c", "d")


def study(seed: int, arms=ARMS, seeds: int = 3, scale: float = 1.0) -> dict[str, dict[int, float]]:
    """Arms without a difference; seeds differ a lot."""
    rng = np.random.default_rng(seed)
    blocks = 10 * rng.standard_normal(seeds)
    return {arm: dict(enumerate(blocks + scale * rng.standard_normal(seeds))) for arm in arms}


def test_the_residual_variance_is_that_of_a_least_squares_fit_of_arms_and_seeds():
    values = study(0)
    rows = [(i, s, values[arm][s]) for i, arm in enumerate(ARMS) for s in range(3)]
    design = np.zeros((len(rows), 7))
    for line, (arm, seed, _) in enumerate(rows):
        design[line, arm] = design[line, 4 + seed] = 1
    y = np.array([value for *_, value in rows])
    fitted = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    found = compare_all(values)
    assert found.freedom == 6
    assert found.spread**2 == pytest.approx(((y - fitted) ** 2).sum() / 6, rel=1e-9)


@pytest.mark.parametrize(("arms", "freedom"), [(2, 1), (2, 4), (3, 4), (9, 16), (6, 20)])
def test_dunnetts_p_is_that_of_a_multivariate_t(arms, freedom):
    for t in (1.0, 2.5, 4.0):
        if arms == 2:
            expected = 2 * stats.t.sf(t, freedom)
        else:
            shape = (np.eye(arms - 1) + 1) / 2
            inside = stats.multivariate_t(shape=shape, df=freedom).cdf(
                np.full(arms - 1, t), lower_limit=np.full(arms - 1, -t), maxpts=200_000, random_state=0
            )
            expected = 1 - inside
        assert dunnett_p(t, arms, freedom) == pytest.approx(expected, abs=2e-4)


def test_tukeys_p_of_two_arms_is_students():
    assert tukey_p(2.5, 2, 4) == pytest.approx(2 * stats.t.sf(2.5, 4), abs=1e-8)
    assert tukey_p(1e3, 9, 16) < 1e-9


def test_two_arms_are_compared_by_the_paired_t_test():
    values = study(3, ("a", "b"), 5)
    (found,) = compare_all(values).differences
    expected = stats.ttest_rel(list(values["a"].values()), list(values["b"].values()))
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6)
    low, high = expected.confidence_interval(1 - TUKEY_LEVEL)
    assert (found.difference.low, found.difference.high) == pytest.approx((low, high), rel=1e-6)


def test_interval_and_p_agree_about_every_pair():
    for seed in range(8):
        values = study(seed)
        values["a"] = {s: value + 3 for s, value in values["a"].items()}
        for one in (*compare_all(values).differences, *compare_with("a", values).differences):
            assert one.significant() == (not one.difference.low <= 0 <= one.difference.high)


def test_block_effects_do_not_change_comparisons():
    values = study(1)
    moved = {arm: {s: value + 100 * s for s, value in seeds.items()} for arm, seeds in values.items()}
    for one, other in zip(compare_all(values).differences, compare_all(moved).differences, strict=True):
        assert one.p == pytest.approx(other.p, rel=1e-6)


def test_one_wide_arm_widens_its_own_intervals():
    table = np.zeros((3, 3))
    table[0] = [-1.0, 0.0, 1.0]
    near, far = pair_errors(own_variances(table), [1, 0], [2, 1], 3)
    assert near < far


def test_every_other_arm_is_compared_with_the_reference():
    found = compare_with("c", study(0))
    assert [(one.first, one.second) for one in found.differences] == [("a", "c"), ("b", "c"), ("d", "c")]
    assert found.procedure == "Dunnett"


@pytest.mark.parametrize("arms", [2, 3, 5, 9])
def test_p_and_the_level_of_the_intervals_are_those_of_dunnett(arms):
    values = study(1, tuple("abcdefghi"[:arms]), seeds=3)
    found = compare_with("a", values)
    for one in found.differences:
        half = one.difference.high - one.difference.mean
        t = abs(one.difference.mean) / half * DUNNETT.quantile(arms, found.freedom)
        assert one.p == pytest.approx(dunnett_p(t, arms, found.freedom), rel=1e-6)
        assert one.significant() == (abs(one.difference.mean) > half)
    at_the_edge = dunnett_p(DUNNETT.quantile(arms, found.freedom), arms, found.freedom)
    assert found.level == pytest.approx(at_the_edge, rel=1e-6)
    assert dunnett_p(0.0, arms, found.freedom) == pytest.approx(1)


@pytest.mark.parametrize("freedom", [1, 2, 4, 16, 40])
@pytest.mark.parametrize("arms", [2, 3, 9])
def test_a_reference_never_costs_more_than_all_pairs(arms, freedom):
    assert DUNNETT.quantile(arms, freedom) <= TUKEY.quantile(arms, freedom) * (1 + 1e-6)


def test_a_seed_that_an_arm_lacks_is_left_out_and_named():
    values = study(0, seeds=4)
    del values["b"][2]
    found = compare_all(values)
    assert found.seeds == (0, 1, 3)
    assert found.notes == ("Seed 2 is in no comparison: it is missing from b.",)
    kept = {arm: {s: seeds[s] for s in (0, 1, 3)} for arm, seeds in values.items()}
    assert found.differences == compare_all(kept).differences


def test_an_arm_that_shares_too_few_seeds_is_left_out_and_named():
    values = {**study(0), "e": {7: 1.0}}
    found = compare_all(values)
    assert found.seeds == (0, 1, 2)
    assert not any("e" in (one.first, one.second) for one in found.differences)
    assert found.notes == ("e is in no comparison: it shares too few seeds with the other arms.",)


def test_the_reference_is_kept_also_where_it_has_the_fewest_seeds():
    values = {**study(0), "e": {0: 1.0, 1: 2.0}}
    assert {one.second for one in compare_with("e", values).differences} == {"e"}
    assert compare_with("e", values).seeds == (0, 1)


def test_one_seed_and_no_seed_in_common_claim_nothing():
    (found,) = compare_all({"a": {0: 1.0}, "b": {0: 2.0}}).differences
    assert (found.p, found.difference.low, found.difference.mean) == (None, None, -1.0)
    assert not found.significant()
    assert not found.equal_within(10.0)
    assert compare_all({"a": {0: 1.0}, "b": {1: 2.0}}).differences == ()
    assert compare_all({"a": {0: 1.0, 1: 2.0}}).differences == ()
    assert compare_all({}).differences == ()


def test_rounding_differences_are_not_significant():
    one, two = {0: 0.1 + 0.2, 1: 0.7 + 0.1, 2: 0.1 + 0.7 + 0.2}, {0: 0.3, 1: 0.8 - 1e-16, 2: 1 - 1e-16}
    (found,) = compare_all({"a": one, "b": two}).differences
    assert found.p == 1.0
    (exact,) = compare_all({"a": {0: 1.0, 1: 2.0}, "b": {0: 1.5, 1: 2.5}}).differences
    assert exact.p == 0.0


def test_equality_requires_an_interval_within_the_margin():
    """A large p is not enough: noisy arms without a difference are not called equal."""
    noisy, quiet = compare_all(study(0)), compare_all(study(0, scale=1e-3))
    assert all(one.p > 0.05 for one in noisy.differences)
    assert not any(one.equal_within(0.01) for one in noisy.differences)
    assert all(one.equal_within(0.01) for one in quiet.differences)


def test_arms_that_differ_by_the_margin_are_rarely_called_equal():
    false = 0
    for seed in range(80):
        values = study(seed, ("a", "b", "c"), 5)
        values["c"] = {s: value + 6.0 for s, value in values["c"].items()}
        false += any(one.equal_within(6.0) for one in compare_all(values).differences if one.second == "c")
    assert false / 80 < 0.05


@pytest.mark.parametrize("margin", [0.0, -1.0, float("nan"), float("inf")])
def test_invalid_margin_is_refused(margin):
    for kind in (RankStudy, TargetsStudy):
        with pytest.raises(ConfigError, match="margin of equality"):
            kind(margin=margin)


def row_losses(arms, seeds: int, rows: int, spread: float) -> RowLosses:
    """Arms whose losses by row differ by noise of the rows that is the same with every seed."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(5, 15, rows)
    of_row = rng.standard_normal(rows)
    sums = {
        arm: {s: list(tokens * (of_row + spread * noise)) for s in range(seeds)}
        for arm, noise in ((arm, rng.standard_normal(rows)) for arm in arms)
    }
    return RowLosses([int(count) for count in tokens], sums)


def test_the_spread_over_rows_is_that_of_a_ratio_of_sums():
    """Against the linearised standard error of a ratio estimator."""
    rows = row_losses(("a", "b"), 3, 200, 0.5)
    found = row_errors(rows, ("a", "b"), (0, 1, 2))
    tokens = np.array(rows.tokens)
    gaps = np.array(rows.sums["a"][0]) - np.array(rows.sums["b"][0])
    mean = gaps.sum() / tokens.sum()
    expected = np.sqrt(((gaps - mean * tokens) ** 2).sum()) / tokens.sum()
    assert found[0, 1] == found[1, 0] == pytest.approx(expected, rel=0.06)


def test_the_interval_of_a_mean_on_new_rows_covers_them():
    """Arms that every seed trains alike: only the rows tell how another test split would come out."""
    covered = 0
    for seed in range(100):
        noise = np.random.default_rng(seed).standard_normal(50)
        rows = RowLosses([1] * 50, {"a": {s: list(noise + 0.01 * s) for s in range(3)}})
        over_seeds = interval([float(noise.mean()) + 0.01 * s for s in range(3)])
        found = mean_on_new_rows(over_seeds, rows, "a", (0, 1, 2))
        covered += found.low <= 0.01 <= found.high
    assert 88 <= covered <= 100
    assert mean_on_new_rows(interval([1.0]), rows, "a", (0,)) is None
    assert mean_on_new_rows(over_seeds, RowLosses([1] * 50, {}), "a", (0, 1, 2)) is None


def test_intervals_on_new_rows_are_wider_and_cover():
    """The truth is no difference; over these rows the arms differ by chance, the same with every seed."""
    rows = row_losses(ARMS, 3, 100, 0.5)
    tokens = sum(rows.tokens)
    losses = {arm: {s: sum(of) / tokens + 1e-4 * s * i for s, of in seeds.items()}
              for i, (arm, seeds) in enumerate(rows.sums.items())}  # fmt: skip
    found = compare_all(losses, rows)
    assert any(one.significant() for one in found.differences)
    for one in found.differences:
        assert one.new_rows.high - one.new_rows.low > one.difference.high - one.difference.low
        assert not one.significant_on_new_rows()
        assert one.new_rows.low <= 0 <= one.new_rows.high


def test_no_interval_on_new_rows_without_row_losses():
    rows = row_losses(ARMS, 3, 20, 0.5)
    rows.sums["a"][1] = ()
    found = compare_all(study(0), rows)
    assert all(one.new_rows is None for one in found.differences)
    assert not any(one.significant_on_new_rows() for one in found.differences)


def script(name: str):
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def simulation():
    return script("study_statistics")


def test_nine_arms_and_three_seeds_err_rarely_and_find_four_standard_deviations(simulation):
    powers = {}
    for name, draw in simulation.KINDS.items():
        errors, power = simulation.rates(draw, 9, 3)
        by_method = dict(zip(simulation.METHODS, errors, strict=True))
        powers[name] = dict(zip(simulation.METHODS, power, strict=True))
        assert by_method["**Tukey, as studies use it**"] <= 0.065, name
        assert by_method["**Dunnett, as studies use it**"] <= 0.065, name
    equal = powers["equal variances"]
    assert equal["**Tukey, as studies use it**"] >= 0.8
    assert equal["**Dunnett, as studies use it**"] >= 0.8
    assert equal["paired t, Holm"] < 0.1


def test_simulation_uses_the_same_tests_as_the_library(simulation):
    values = study(7, tuple("abcdefghi"))
    values["a"] = {s: value + 6 for s, value in values["a"].items()}
    table = np.array([[list(seeds.values()) for seeds in values.values()]])
    for found, procedure in ((compare_all(values), TUKEY), (compare_with("a", values), DUNNETT)):
        reported = simulation.judged(table, procedure)[0]
        assert list(reported) == [one.significant() for one in found.differences]
        assert 0 < reported.sum() < len(reported) or procedure is DUNNETT


def test_the_committed_table_is_that_of_the_script(simulation):
    page = (ROOT / "docs" / "results" / "study_statistics.md").read_text("utf-8")
    for line in simulation.table(simulation.KINDS, *simulation.SIZES[0]):
        assert line in page


def test_the_committed_studies_are_read_as_this_version_reads_them(capsys):
    results = ROOT / "docs" / "results"
    script("reread_results").main([str(file) for file in sorted(results.glob("paper_*.json"))])
    assert capsys.readouterr().out == (results / "reread.md").read_text("utf-8")


def test_rereading_a_study_repeats_its_claims():
    read, judgements = script("reread_results"), []
    for file in sorted((ROOT / "docs" / "results").glob("paper_*.json")):
        results = json.loads(file.read_text("utf-8"))
        stored = [
            one
            for finding in results["findings"]
            for kind in ("comparison", "ranks", "against_whole")
            for one in finding["data"].get(kind, {}).get("differences", ())
        ]
        found = [one for _, compared in read.comparisons(results) for one in compared.differences]
        judgements += stored
        assert [
            (one.significant(), one.significant_on_new_rows(), one.equal_within(MARGIN)) for one in found
        ] == [(one["apart"], one["apart_on_new_rows"], one["equal_within_margin"]) for one in stored]
    assert len(judgements) > 90


def test_equality_is_not_claimed_without_losses_of_single_rows():
    read = script("reread_results")
    found = compare_all(study(0))
    stored = as_comparison(found, MARGIN)
    with pytest.raises(SystemExit, match="no interval on new rows"):
        read.with_new_rows(found, stored)
