"""Who may wait at an HTTP server, and how much: baton/server/admission.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.server.admission import GROUP_WINDOW, LINE_FACTOR, Admission, Bodies, Body, Ticket
from baton.server.api_error import ApiError

LIMIT = 256
HUGE = 4096  # the most prompts, each with the most answers


def status(admission: Admission, tenant: str, choices: int) -> int:
    """Of the answer: 200 if there were places. They are given back."""
    try:
        admission.take(tenant, choices).close()
    except ApiError as error:
        return error.status
    return 200


def fill(admission: Admission, tenant: str, choices: int) -> list[Ticket]:
    """As many requests as get places."""
    found: list[Ticket] = []
    while True:
        try:
            found.append(admission.take(tenant, choices))
        except ApiError:
            return found


def test_a_huge_request_takes_few_places_and_leaves_room() -> None:
    admission = Admission(LIMIT)
    admission.take("Ann", HUGE)
    assert (admission.waiting, admission.in_lines) == (GROUP_WINDOW, HUGE - GROUP_WINDOW)
    assert [status(admission, who, 1) for who in ("Ann", "Bob")] == [200, 200]


@pytest.mark.parametrize("choices", [1, 3, GROUP_WINDOW, 100, HUGE])
def test_nobody_can_take_all_places(choices: int) -> None:
    admission = Admission(LIMIT)
    fill(admission, "Ann", choices)
    assert admission.waiting <= LIMIT - GROUP_WINDOW
    assert len(fill(admission, "Bob", 1)) > GROUP_WINDOW * 0.8
    assert status(admission, "Cid", 1) == 200


def test_who_is_alone_gets_nearly_all() -> None:
    assert len(fill(Admission(LIMIT), "Ann", 1)) >= LIMIT * 0.88
    assert len(fill(Admission(1), "Ann", 1)) == 1
    assert status(Admission(8), "Ann", 200) == 200  # a window is no larger than the queue


def test_a_second_huge_request_of_another_fits() -> None:
    admission = Admission(LIMIT)
    admission.take("Ann", HUGE)
    assert status(admission, "Ann", HUGE) == 503
    assert status(admission, "Bob", HUGE) == 200


def test_what_can_never_fit_is_told_the_limit() -> None:
    with pytest.raises(ApiError, match="at most 132 fit") as refused:
        Admission(4).take("Ann", LINE_FACTOR * 4 + 5)
    assert refused.value.status == 400
    Admission(4).take("Ann", LINE_FACTOR * 4 + 4)


def test_those_in_line_move_up() -> None:
    admission = Admission(LIMIT)
    ticket = admission.take("Ann", 20)
    seen = []
    for _ in range(21):
        seen.append((admission.waiting, admission.in_lines))
        ticket.moved_up()
    assert seen[:6] == [(16, 4), (16, 3), (16, 2), (16, 1), (16, 0), (15, 0)]
    assert seen[-1] == (0, 0)
    ticket.close()
    assert (admission.waiting, admission.in_lines) == (0, 0)


TAKE = st.tuples(st.sampled_from("ABCD"), st.integers(1, 80))
STEP = TAKE | st.tuples(st.sampled_from(["up", "end"]), st.integers(0, 30))


@given(st.integers(1, 40), st.lists(STEP, max_size=120))
def test_counts_are_those_of_the_open_tickets_and_within_the_limits(
    limit: int, steps: list[tuple[str, int]]
) -> None:
    admission, lines = Admission(limit), LINE_FACTOR * limit
    left: list[tuple[Ticket, int]] = []
    for what, number in steps:
        if what not in ("up", "end"):
            free = limit - admission.waiting
            alone = not any(ticket.tenant == what for ticket, _ in left)
            try:
                left.append((admission.take(what, number), number))
            except ApiError as error:
                refused = error.status
            else:
                continue
            assert refused == (400 if number > lines + admission.window else 503)
            assert not alone or number > admission.window or number > free
        elif left:
            index = number % len(left)
            ticket, choices = left[index]
            if what == "up":
                ticket.moved_up()
                left[index] = ticket, max(choices - 1, 0)
            else:
                ticket.close()
                del left[index]
        at_router = sum(min(choices, ticket.window) for ticket, choices in left)
        assert admission.waiting == at_router <= limit
        assert admission.in_lines == sum(n for _, n in left) - at_router <= lines
    for ticket, _ in left:
        ticket.close()
    assert (admission.waiting, admission.in_lines) == (0, 0)
    assert not admission._waiting._held, "a tenant is remembered"


def arriving(bodies: Bodies, tenant: str, size: int) -> list[Body]:
    """As many bodies of this size as there is memory for."""
    found: list[Body] = []
    while True:
        body = bodies.body(tenant)
        try:
            for _ in range(4):
                body.add(size // 4)
        except ApiError:
            body.close()
            return found
        found.append(body)


@pytest.mark.parametrize("size", [4, 64, 4096])
def test_bodies_of_one_client_leave_memory_for_others(size: int) -> None:
    bodies = Bodies(64 * 4096, allowance=0)
    hers = arriving(bodies, "Ann", size)
    assert 0.8 * 64 * 4096 < bodies.held < 0.9 * 64 * 4096
    his = arriving(bodies, "Bob", size)
    assert len(his) * size > 0.8 * (64 * 4096 - len(hers) * size)
    for body in (*hers, *his, *his):
        body.close()
    assert bodies.held == 0


@given(st.lists(st.tuples(st.sampled_from("ABC"), st.integers(0, 9000)), max_size=60))
def test_bodies_never_hold_more_than_there_is(parts: list[tuple[str, int]]) -> None:
    bodies = Bodies(20_000, allowance=500)
    open_: dict[str, list[Body]] = {}
    for tenant, size in parts:
        body = bodies.body(tenant)
        open_.setdefault(tenant, []).append(body)
        try:
            body.add(size)
            body.add(size)
        except ApiError:
            assert size > 250, "within its allowance"
        assert 0 <= bodies.held <= 20_000
    for each in open_.values():
        for body in each:
            body.close()
            body.close()
    assert bodies.held == 0
