"""A log line is one JSON object that a machine can read."""

import json
import logging
import sys
from typing import Any

from common.logs import JsonFormatter, request_id_var


def line(record: logging.LogRecord) -> dict[str, Any]:
    text = JsonFormatter("scheduler").format(record)
    assert "\n" not in text
    parsed: dict[str, Any] = json.loads(text)
    return parsed


def record(message: str, *arguments: object, **fields: object) -> logging.LogRecord:
    return logging.getLogger("a.b").makeRecord(
        "a.b", logging.WARNING, "f.py", 1, message, arguments, None, extra=fields
    )


def test_a_line_says_what_where_and_how_bad() -> None:
    parsed = line(record("%d pages", 3))
    del parsed["time"]
    assert parsed == {"level": "warning", "service": "scheduler", "logger": "a.b", "message": "3 pages"}


def test_time_is_utc_with_milliseconds() -> None:
    entry = record("x")
    entry.created, entry.msecs = 0.007, 7.0
    assert line(entry)["time"] == "1970-01-01T00:00:00.007Z"


def test_the_request_id_of_the_call_is_added() -> None:
    token = request_id_var.set("r-1")
    try:
        assert line(record("x"))["request_id"] == "r-1"
    finally:
        request_id_var.reset(token)


def test_extra_fields_are_added() -> None:
    assert line(record("x", worker_id="w0", pages=7)).items() >= {"worker_id": "w0", "pages": 7}.items()


def test_an_extra_that_json_cannot_hold_is_written_as_text() -> None:
    assert line(record("x", path=logging)).get("path") == str(logging)


def test_an_exception_is_added_with_its_traceback_in_one_line() -> None:
    try:
        raise ValueError("boom")
    except ValueError:
        entry = logging.getLogger("a").makeRecord("a", logging.ERROR, "f.py", 1, "x", (), sys.exc_info())
    assert line(entry)["exception"].endswith("ValueError: boom")
