"""Routes: the slot of each row."""

import pytest
import torch

from brushstroke.errors import RouteError
from brushstroke.layers import Route


def rows_of(route: Route, rows: int) -> dict[int, list[int]]:
    everyone = torch.arange(rows)
    return {segment.slot: everyone[segment.rows].tolist() for segment in route.segments(rows)}


@pytest.mark.parametrize(
    ("slots", "rows", "expected"),
    [
        ((1, 0, 2), 3, {1: [0], 2: [2]}),
        ((1, 2, 1), 3, {1: [0, 2], 2: [1]}),
        ((1, 2), 6, {1: [0, 1, 2], 2: [3, 4, 5]}),
        ((0, 0), 2, {}),
        ((3,), 4, {3: [0, 1, 2, 3]}),
    ],
)
def test_segments_and_indices(slots, rows, expected):
    route = Route(slots)
    assert rows_of(route, rows) == expected
    index = route.slot_index(rows, torch.device("cpu")).tolist()
    assert {s: [i for i, t in enumerate(index) if t == s] for s in set(index) - {0}} == expected


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_batch_of_another_size_is_an_error(rows):
    route = Route((1, 2))
    for call in (lambda: route.segments(rows), lambda: route.slot_index(rows, torch.device("cpu"))):
        with pytest.raises(RouteError, match=f"2 rows, the batch {rows}"):
            call()


def test_switching_and_back():
    route = Route((1,))
    assert route.uniform == 1
    restore = route.set((1, 2))
    assert route.uniform is None
    assert rows_of(route, 2) == {1: [0], 2: [1]}
    restore()
    assert route.slots == (1,)
    assert rows_of(route, 2) == {1: [0, 1]}
    with pytest.raises(RouteError, match="at least one row"):
        route.set(())
    assert route.slots == (1,)


def test_backward_check_compares_slots_not_objects():
    route = Route((1,))
    x = torch.ones(2, requires_grad=True)
    y = route.guard(x * 2)
    route.set((2,))()
    y.sum().backward()
    y = route.guard(x * 2)
    route.set((2,))
    with pytest.raises(RouteError, match=r"under the route \(1,\).*under \(2,\)"):
        y.sum().backward()


def test_no_backward_check_without_gradients():
    y = torch.ones(2)
    assert Route((1,)).guard(y) is y
