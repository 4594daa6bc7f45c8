"""Routes: the slot of each row."""

import pytest
import torch

from brushstroke.errors import RouteError
from brushstroke.layers import Route


def rows_of(route: Route, *shape: int) -> dict[int, list[int]]:
    """For each slot the tokens of its spans."""
    tokens, found = torch.arange(torch.Size(shape).numel()), {}
    for span in route.spans(shape):
        found[span.slot] = found.get(span.slot, []) + tokens[span.tokens].tolist()
    return found


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
def test_spans_and_indices(slots, rows, expected):
    route = Route(slots)
    assert rows_of(route, rows) == expected
    index = route.slot_index(rows, torch.device("cpu")).tolist()
    assert {s: [i for i, t in enumerate(index) if t == s] for s in set(index) - {0}} == expected


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_batch_of_another_size_is_an_error(rows):
    route = Route((1, 2))
    for call in (lambda: route.spans((rows, 2)), lambda: route.slot_index(rows, torch.device("cpu"))):
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
    with pytest.raises(RouteError, match=r"used the route \(1,\).*is now \(2,\)"):
        y.sum().backward()


def test_no_backward_check_without_gradients():
    y = torch.ones(2)
    assert Route((1,)).guard(y) is y


def test_the_tokens_of_a_row_share_its_slot():
    assert rows_of(Route((1, 0, 2)), 3, 2) == {1: [0, 1], 2: [4, 5]}
    assert len(Route((1, 1, 2, 2)).spans((4, 3))) == 2


def test_spans_of_a_packed_row():
    route = Route((0,))
    restore = route.set((1, 0, 2, 2, 1), (3, 2, 1, 1, 2))
    assert (route.uniform, route.lengths) == (None, (3, 2, 1, 1, 2))
    assert rows_of(route, 1, 9) == rows_of(route, 9) == {1: [0, 1, 2, 7, 8], 2: [5, 6]}
    assert len(route.spans((1, 9))) == 3
    for shape in ((1, 8), (2, 9), (10,)):
        with pytest.raises(RouteError, match="a packed row of 9 tokens"):
            route.spans(shape)
    with route.kept():
        route.set((3,))
        assert route.slots == (3,)
    assert route.lengths == (3, 2, 1, 1, 2)
    restore()
    assert (route.slots, route.lengths) == ((0,), None)


def test_a_packed_row_of_one_slot_is_a_uniform_route():
    route = Route((0,))
    route.set((2, 2), (3, 4))
    assert (route.uniform, route.slots, route.lengths) == (2, (2,), None)


def test_the_guard_tells_spans_apart():
    route = Route((1, 2))
    y = route.guard(torch.ones(2, requires_grad=True) * 2)
    route.set((1, 2), (1, 1))
    with pytest.raises(RouteError, match="before the route changes"):
        y.sum().backward()
