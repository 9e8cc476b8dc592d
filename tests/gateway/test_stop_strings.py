"""Stop strings against a plain definition of them, over any cut of the text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.stop_strings import StopMatcher

# Few letters make overlaps likely.
LETTERS = st.text("abc", max_size=40)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4)


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop string that ends first, the longest one of those that end there."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


def passed(matcher: StopMatcher, pieces: list[str]) -> list[str]:
    """What can be shown after each piece, then after the end."""
    shown = []
    for piece in pieces:
        shown.append(matcher.push(piece))
        if matcher.matched is not None:
            return shown
    return [*shown, matcher.flush()]


@given(LETTERS, STOPS)
def test_a_text_ends_before_the_stop_string_that_ends_first(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops, include_stop=False)
    assert ("".join(passed(matcher, [text])), matcher.matched) == expected(text, stops)


@given(st.lists(LETTERS, max_size=8), STOPS)
def test_the_result_does_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops, include_stop=False)
    assert ("".join(passed(matcher, pieces)), matcher.matched) == expected("".join(pieces), stops)


@given(LETTERS, STOPS)
def test_no_part_of_a_stop_string_is_ever_shown(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops, include_stop=False)
    whole, _ = expected(text, stops)
    shown = ""
    for character in text:
        shown += matcher.push(character)
        assert whole.startswith(shown)
        if matcher.matched is not None:
            break


@given(LETTERS, STOPS)
def test_nothing_is_held_that_cannot_become_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops, include_stop=False)
    shown = matcher.push(text)
    held = text[len(shown) :]
    assert matcher.matched is not None or not held or any(stop.startswith(held) for stop in stops)


@given(LETTERS, STOPS)
def test_an_included_stop_string_ends_the_text(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops, include_stop=True)
    before, stop = expected(text, stops)
    assert "".join(passed(matcher, [text])) == before + (stop or "")


@given(LETTERS, LETTERS, STOPS)
def test_what_is_not_honoured_is_text(early: str, late: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops, include_stop=False)
    shown = matcher.push(early, honoured=False)
    assert matcher.matched is None
    shown += "".join(passed(matcher, [late]))
    ends = range(len(early) + 1, len(early + late) + 1)
    first = next((end for end in ends if any((early + late)[:end].endswith(stop) for stop in stops)), None)
    if first is None:
        assert shown == early + late
    else:
        assert matcher.matched is not None
        assert len(shown) <= max(len(early), first - len(matcher.matched))


@pytest.mark.parametrize(
    ("stops", "shown"),
    [
        pytest.param(["bc", "abc"], "x", id="the longest of those that end together"),
        pytest.param(["ab", "abc"], "x", id="the first that ends"),
        pytest.param(["c"], "xab", id="one character"),
        pytest.param(["d"], "xabcx", id="none"),
        pytest.param([], "xabcx", id="no stop strings"),
    ],
)
def test_of_several_stop_strings(stops: list[str], shown: str) -> None:
    assert "".join(passed(StopMatcher(stops, include_stop=False), ["xabcx"])) == shown
