"""The `loraplex` command: what it prints, and its exit codes."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from google.rpc import code_pb2

from loraplex.command import build_parser, main
from loraplex.commands.terminal import program
from loraplex.fleet import Fleet
from loraplex.requests import GenerateOptions
from loraplex.v1 import scheduler_pb2
from tests.loraplex import fakes
from tests.loraplex.fake_services import is_running, write_model, write_services
from tests.loraplex.fakes import FakeGateway

COMMANDS = [[], ["up"], ["generate"], ["adapters"], ["status"], ["memory"], ["explain"]]
COMMANDS += [["adapters", verb] for verb in ("push", "list", "show", "rm", "alias", "import", "export")]


@pytest.fixture(autouse=True)
def chosen_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAPLEX_GATEWAY", raising=False)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_is_there_for_every_command(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert " ".join(["usage: loraplex", *command]) in capsys.readouterr().out


@pytest.mark.parametrize("command", ["up", "generate", "adapters", "status", "memory", "explain"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"examples:\n  loraplex {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["fly"],
        ["generate"],
        ["generate", "x", "--max-tokens", "many"],
        ["up"],
        ["up", "--model=m", "--workers=0"],
        ["up", "--model=m", "--port=65536"],
        ["up", "--model=m", "--port=-1"],
        ["up", "--model=m", "--ready-timeout=0"],
        ["up", "--model=m", "--ready-timeout=nan"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_generate_streams_the_text(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--gateway", address, "one two"]) == 0
    assert capsys.readouterr().out == "onetwo\n"


def test_generate_prints_the_whole_answer(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--gateway", address, "--no-stream", "one two"]) == 0
    assert capsys.readouterr().out == "ONE TWO\n"


def test_generate_sends_its_options(address: str, gateway: FakeGateway) -> None:
    options = ["--adapter", "alpha", "--max-tokens", "3", "--temperature", "0", "--seed", "4"]
    main(["generate", "--gateway", address, *options, "one"])
    (request,) = gateway.requests
    assert (request.adapter_id, request.stopping.max_tokens, request.sampling.seed) == ("alpha", 3, 4)
    assert request.sampling.HasField("temperature")


def test_generate_has_a_flag_for_every_option() -> None:
    flags = {"adapter_version", "logit_bias", "stop_token_ids", "ttft_slo_seconds"}
    parsed = vars(build_parser().parse_args(["generate", "x"])).keys()
    assert GenerateOptions.__annotations__.keys() - flags <= parsed


def test_generate_passes_lists_and_switches_on(address: str, gateway: FakeGateway) -> None:
    main(["generate", "--gateway", address, "--stop", "a", "--stop", "b", "--echo", "--top-p", "0.5", "one"])
    (request,) = gateway.requests
    assert (list(request.stopping.stop), request.output.echo, request.sampling.top_p) == (["a", "b"], True, 0.5)


def test_generate_sends_a_conversation(address: str, gateway: FakeGateway) -> None:
    main(["generate", "--gateway", address, "--no-stream", "--chat", "--system", "Be brief.", "Hi"])
    (request,) = gateway.requests
    assert [message.role for message in request.chat.messages] == ["system", "user"]


def test_generate_prints_several_answers_apart(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--gateway", address, "--n", "2", "one"]) == 0
    assert capsys.readouterr().out == "[0] ONE\n[1] ONE\n"


def test_generate_prints_json(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--gateway", address, "--json", "one"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["outputs"][0]["text"], answer["usage"]["prompt_tokens"]) == ("ONE", 3)


def test_the_gateway_may_come_from_the_environment(
    address: str, gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_GATEWAY", address)
    assert main(["generate", "one"]) == 0
    assert len(gateway.requests) == 1


def test_an_error_is_one_line_with_reason_and_next_step(
    address: str, gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.failure = fakes.status(code_pb2.NOT_FOUND, "ADAPTER_NOT_FOUND", "no adapter\n'omega'")
    assert main(["generate", "--gateway", address, "one"]) == 1
    line = "loraplex: ADAPTER_NOT_FOUND: no adapter 'omega'. Next: `loraplex adapters list` shows what there is\n"
    assert capsys.readouterr().err == line


def test_an_error_with_a_hint_says_when_to_retry(
    address: str, gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.failure = fakes.status(code_pb2.UNAVAILABLE, "DRAINING", "it stops", retry_after_seconds=2.0)
    assert main(["adapters", "list", "--gateway", address]) == 1
    assert capsys.readouterr().err == "loraplex: DRAINING: it stops. Next: try again in 2 s\n"


@pytest.mark.parametrize("command", [["generate", "x"], ["adapters", "list"], ["status"]], ids=" ".join)
def test_nobody_there_says_how_to_start_a_fleet(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--gateway", "127.0.0.1:1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("loraplex: UNREACHABLE: ")
    assert "`loraplex up --model DIR`" in error
    assert error.count("\n") == 1


def test_push_uploads_a_folder(address: str, adapter_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "push", "alpha", str(adapter_folder), "--gateway", address]) == 0
    assert capsys.readouterr().out == "pushed alpha digest\nwarning: a warning\n"


def test_push_of_nothing_is_exit_code_1(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "push", "alpha", str(tmp_path / "nowhere"), "--gateway", address]) == 1
    assert "ADAPTER_FOLDER_MISSING" in capsys.readouterr().err


def test_list_prints_a_table(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "list", "--gateway", address]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "ADAPTER"
    assert [row.split()[0] for row in rows] == list(fakes.KNOWN_ADAPTERS)


def test_status_says_what_is_served(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--gateway", address]) == 0
    first, _, *models = capsys.readouterr().out.splitlines()
    assert first == f"gateway {address}: serving"
    assert [row.split()[0] for row in models] == ["(base)", *fakes.KNOWN_ADAPTERS]


def test_status_of_a_gateway_that_is_not_ready_is_exit_code_1(
    address: str, gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.serving = False
    assert main(["status", "--gateway", address]) == 1
    assert capsys.readouterr().out == f"gateway {address}: not serving\n"


def test_status_asks_the_scheduler_too(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--gateway", address, "--scheduler", address]) == 0
    *_, summary, _, worker = capsys.readouterr().out.splitlines()
    assert summary.startswith(f"scheduler {address}: epoch 3, ")
    assert worker.split()[:2] == ["worker-0", "ready"]


def test_status_says_who_waits_and_lacks_how_much(
    address: str, gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.waiting_tenants = [
        scheduler_pb2.TenantSnapshot(tenant="gold", weight=4, queued_requests=2, queued_seconds=1.5, deficit=0.25),
        scheduler_pb2.TenantSnapshot(tenant="rest", weight=1, queued_requests=9, queued_seconds=30),
    ]
    assert main(["status", "--gateway", address, "--scheduler", address]) == 0
    gold, rest = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert gold == ["gold", "4", "2", "1.5", "0.2"]
    assert rest == ["rest", "1", "9", "30.0", "not", "counted"]


def test_what_to_type_is_found_from_the_users_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "a folder" / "loraplex"
    script.parent.mkdir()
    script.touch(mode=0o755)
    monkeypatch.setattr("sys.argv", [str(script)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.devnull)
    assert program() == "'a folder/loraplex'"
    monkeypatch.setenv("PATH", str(script.parent))
    assert program() == "loraplex"
    monkeypatch.setattr("sys.argv", ["/somewhere/loraplex/__main__.py"])
    assert program() == f"{sys.executable} -m loraplex"


class TestUp:
    """With fake services, and the scripted gateway behind the address they announce."""

    @pytest.fixture
    def command(self, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        services = write_services(tmp_path / "services")
        monkeypatch.setattr("loraplex.fleet.find_services", lambda: services)
        monkeypatch.setenv("FAKE_ADDRESS", address)
        monkeypatch.setattr("sys.argv", ["/nowhere/bin/loraplex"])
        return ["up", "--model", str(write_model(tmp_path / "model")), "--data-dir", str(tmp_path / "data"), "--port=0"]

    @pytest.fixture
    def pids(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Presses Ctrl-C as soon as the fleet serves; holds the processes that ran then."""
        running: list[int] = []

        def press_ctrl_c(fleet: Fleet, timeout_seconds: float | None = None) -> None:
            if timeout_seconds is None:
                running.extend(service.pid for service in fleet.services.values())
                raise KeyboardInterrupt

        monkeypatch.setattr(Fleet, "wait", press_ctrl_c)
        return running

    def test_it_serves_until_ctrl_c_and_leaves_nothing(
        self, command: list[str], pids: list[int], address: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(command) == 0
        output = capsys.readouterr().out
        assert f"\nready gateway={address}\n" in output
        assert re.search(rf"\ntry it: +\S*loraplex\S* generate --gateway {address} ", output)
        assert len(pids) == 4
        assert not any(is_running(pid) for pid in pids)

    def test_one_bad_adapter_does_not_stop_the_others(
        self,
        command: list[str],
        pids: list[int],
        adapter_folder: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        adapters = tmp_path / "adapters"
        (adapters / "broken").mkdir(parents=True)
        adapter_folder.rename(adapters / "good")
        assert main([*command, "--adapters", str(adapters)]) == 0
        rows = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
        assert ["good", "loaded", "a warning"] in rows
        (broken,) = (row for row in rows if row[0] == "broken")
        assert broken[1] == "refused"
        assert broken[2].startswith("ADAPTER_FILE_MISSING: ")

    def test_a_service_that_fails_is_one_error_line(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "services" / "gateway" / "__main__.py").write_text("raise SystemExit('the port is taken')")
        assert main(command) == 1
        assert capsys.readouterr().err.startswith("loraplex: gateway did not start: the port is taken (see ")

    def test_a_missing_model_is_one_error_line(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*command, "--model", str(tmp_path / "nowhere")]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"loraplex: the model folder {tmp_path / 'nowhere'} does not exist")
        assert error.count("\n") == 1

    @pytest.mark.parametrize(
        ("files", "problem"),
        [([], "does not exist"), (["a/x"], "has no sub-folders"), (["a/adapter_config.json"], "is an adapter itself")],
        ids=["missing", "empty", "one adapter"],
    )
    def test_a_wrong_adapters_folder_is_one_error_line(
        self, command: list[str], files: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in files:
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).touch()
        assert main([*command, "--adapters", str(tmp_path / "a")]) == 1
        assert problem in capsys.readouterr().err
