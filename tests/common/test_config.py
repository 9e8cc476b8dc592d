"""Options of a service: defaults, environment, flags, and what is refused."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from common.config import ServiceConfig, option, parse


@dataclass(frozen=True, kw_only=True)
class Config(ServiceConfig):
    """A service of these tests."""

    model: Path = option(help="checkpoint folder")
    workers: int = option(2, help="how many")
    budget_bytes: int | None = option(None, help="no limit without it")
    step_log: bool = option(False, help="log each step")


def read(*argv: str) -> Config:
    return parse(Config, "test", ["--model", "m", *argv])


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit, match="2"):
        parse(Config, "test", argv)
    return capsys.readouterr().err


def test_defaults_hold_when_nothing_is_given() -> None:
    assert read() == Config(model=Path("m"))


def test_a_flag_sets_a_field_in_its_type() -> None:
    assert read("--workers", "3", "--budget-bytes", "4096", "--step-log") == Config(
        model=Path("m"), workers=3, budget_bytes=4096, step_log=True
    )


def test_the_environment_sets_a_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_WORKERS", "5")
    assert read().workers == 5


def test_the_environment_satisfies_a_required_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_MODEL", "/m")
    assert parse(Config, "test", []).model == Path("/m")


def test_a_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_WORKERS", "5")
    assert read("--workers", "6").workers == 6


@pytest.mark.parametrize(("text", "value"), [("false", False), ("0", False), ("True", True), ("1", True)])
def test_the_environment_spells_a_switch(monkeypatch: pytest.MonkeyPatch, text: str, value: bool) -> None:
    monkeypatch.setenv("LORAPLEX_STEP_LOG", text)
    assert read().step_log is value


def test_a_flag_turns_a_switch_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_STEP_LOG", "true")
    assert read("--no-step-log").step_log is False


def test_a_missing_required_field_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model" in refusal(capsys)


def test_a_flag_of_the_wrong_type_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--workers" in refusal(capsys, "--model", "m", "--workers", "many")


@pytest.mark.parametrize("flag", ["port", "metrics-port"])
@pytest.mark.parametrize("number", ["-1", "65536"])
def test_a_port_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], flag: str, number: str) -> None:
    message = f"{flag.replace('-', '_')} is {number}; it must be 0 to 65535"
    assert message in refusal(capsys, "--model", "m", f"--{flag}={number}")


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--workres" in refusal(capsys, "--model", "m", "--workres", "2")


def test_a_flag_outside_its_choices_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--log-level" in refusal(capsys, "--model", "m", "--log-level", "loud")


@pytest.mark.parametrize(
    ("variable", "text"),
    [("LORAPLEX_WORKERS", "many"), ("LORAPLEX_LOG_LEVEL", "loud"), ("LORAPLEX_STEP_LOG", "maybe")],
)
def test_a_bad_value_in_the_environment_is_refused_by_its_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: str, text: str
) -> None:
    monkeypatch.setenv(variable, text)
    assert f"{variable}={text!r}" in refusal(capsys, "--model", "m")


def test_help_names_each_environment_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse(Config, "test", ["--help"])
    assert "[LORAPLEX_DRAIN_SECONDS]" in " ".join(capsys.readouterr().out.split())
