import json
import time
from typing import Any

import pytest
from peft.utils.other import get_pattern_key

from adapter_store.peft_config import parse_config
from common.errors import InvalidArgument
from tests.adapter_store.crafted import make_config

KEY = "model.layers.1.self_attn.q_proj"


def parse(**changes: Any) -> Any:
    return parse_config(json.dumps(make_config(**changes)).encode())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "USE_DORA_UNSUPPORTED"),
        ({"modules_to_save": ["lm_head"]}, "MODULES_TO_SAVE_UNSUPPORTED"),
        ({"bias": "all"}, "BIAS_UNSUPPORTED"),
        ({"bias": "lora_only"}, "BIAS_UNSUPPORTED"),
        ({"lora_bias": True}, "LORA_BIAS_UNSUPPORTED"),
        ({"trainable_token_indices": [1]}, "TRAINABLE_TOKEN_INDICES_UNSUPPORTED"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "TRAINABLE_TOKEN_INDICES_UNSUPPORTED"),
        ({"target_parameters": ["experts.weight"]}, "TARGET_PARAMETERS_UNSUPPORTED"),
        ({"layer_replication": [[0, 1]]}, "LAYER_REPLICATION_UNSUPPORTED"),
        ({"alora_invocation_tokens": [1]}, "ALORA_INVOCATION_TOKENS_UNSUPPORTED"),
        ({"use_qalora": True}, "USE_QALORA_UNSUPPORTED"),
        ({"use_bdlora": {"nblocks": 2}}, "USE_BDLORA_UNSUPPORTED"),
        ({"arrow_config": {"top_k": 1}}, "ARROW_CONFIG_UNSUPPORTED"),
        ({"kasa_config": {"beta": 1}}, "KASA_CONFIG_UNSUPPORTED"),
        ({"monteclora_config": {"num_samples": 1}}, "MONTECLORA_CONFIG_UNSUPPORTED"),
        ({"velora_config": {"scale": 1}}, "VELORA_CONFIG_UNSUPPORTED"),
        ({"auto_map": {"AutoModel": "x--y"}}, "AUTO_MAP_UNSUPPORTED"),
        ({"init_lora_weights": "pissa"}, "INIT_LORA_WEIGHTS_UNSUPPORTED"),
        ({"init_lora_weights": "loftq"}, "INIT_LORA_WEIGHTS_UNSUPPORTED"),
        ({"peft_type": "IA3"}, "PEFT_TYPE_UNSUPPORTED"),
        ({"peft_type": None}, "PEFT_TYPE_UNSUPPORTED"),
        ({"use_tomorrows_trick": True}, "SETTING_UNKNOWN"),
        ({"target_modules": ["q_proj", "lm_head"]}, "TARGET_MODULE_UNSUPPORTED"),
        ({"target_modules": ["embed_tokens"]}, "TARGET_MODULE_UNSUPPORTED"),
        ({"rank_pattern": {"(a+)+$": 3}}, "PATTERN_UNSUPPORTED"),
        ({"alpha_pattern": {"q_proj|k_proj": 3}}, "PATTERN_UNSUPPORTED"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_what_changes_the_result_is_refused_by_name(changes: dict[str, Any], reason: str) -> None:
    (name,) = changes
    with pytest.raises(InvalidArgument) as caught:
        parse(**changes)
    assert caught.value.reason == reason
    mentioned = {"use_dora": "DoRA", "use_qalora": "QALoRA", "target_modules": "target module"}
    assert mentioned.get(name, name) in caught.value.message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 0}, "RANK_INVALID"),
        ({"r": -1}, "RANK_INVALID"),
        ({"r": 1.0}, "RANK_INVALID"),
        ({"r": "8"}, "RANK_INVALID"),
        ({"r": True}, "RANK_INVALID"),
        ({"r": None}, "RANK_INVALID"),
        ({"rank_pattern": {"q_proj": 0}}, "RANK_INVALID"),
        ({"lora_alpha": None}, "ALPHA_INVALID"),
        ({"lora_alpha": "16"}, "ALPHA_INVALID"),
        ({"lora_alpha": True}, "ALPHA_INVALID"),
        ({"lora_alpha": 1e308}, "ALPHA_INVALID"),
        ({"alpha_pattern": {"q_proj": None}}, "ALPHA_INVALID"),
        ({"rank_pattern": ["q_proj"]}, "CONFIG_INVALID"),
        ({"use_rslora": "yes"}, "CONFIG_INVALID"),
        ({"target_modules": [1]}, "CONFIG_INVALID"),
        ({"layers_to_transform": ["1"]}, "CONFIG_INVALID"),
        ({"base_model_name_or_path": 7}, "CONFIG_INVALID"),
        ({"base_model_name_or_path": "x" * 1025}, "CONFIG_INVALID"),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(**changes)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        pytest.param(b"", "not valid JSON", id="empty"),
        pytest.param(b"[]", "not a JSON object", id="list"),
        pytest.param(b'{"r": 1, "r": 2}', "the key 'r' twice", id="duplicate-key"),
        pytest.param(b'{"a": {"r": 1, "r": 1}}', "the key 'r' twice", id="nested-duplicate-key"),
        pytest.param(b'{"lora_alpha": NaN}', "holds NaN", id="nan"),
        pytest.param(b'{"lora_alpha": -Infinity}', "holds -Infinity", id="infinity"),
        pytest.param(b'{"r": ' + b"9" * 5000 + b"}", "more than 64 bits", id="long-integer"),
        pytest.param(b'{"r": -0}', "negative zero", id="negative-zero"),
        pytest.param(b'{"a": ' + b"[" * 9 + b"]" * 9 + b"}", "deeper than 8", id="deep"),
        pytest.param(b"[" * 60000, "deeper than 8", id="very-deep"),
        pytest.param(b'{"a": "\xff"}', "not valid UTF-8", id="invalid-utf8"),
        pytest.param(b'{"a": "\\ud800"}', "surrogate", id="lone-surrogate"),
        pytest.param(b"{" + b" " * 65536 + b"}", "limit is 65536", id="large"),
        pytest.param(b"\x80\x04\x95", "not valid UTF-8", id="pickle"),
    ],
)
def test_json_with_two_meanings_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(InvalidArgument, match=problem):
        parse_config(data)


def test_brackets_in_strings_are_no_depth() -> None:
    assert parse(base_model_name_or_path='[[[[[[[[[[\\"[[[').base_model.startswith("[[[")


@pytest.mark.parametrize(
    "text", ['{"a": "' + '\\"' * 30000, '{"' * 15000, '"' * 60001], ids=["escapes", "keys", "quotes"]
)
def test_unterminated_strings_take_no_time(text: str) -> None:
    started = time.process_time()
    with pytest.raises(InvalidArgument):
        parse_config(text.encode())
    # Quadratic scanning of these takes seconds.
    assert time.process_time() - started < 1


@pytest.mark.parametrize("target_modules", ["all-linear", "(a+)+$", ".*proj"])
def test_a_string_of_target_modules_is_not_evaluated(target_modules: str) -> None:
    assert parse(target_modules=target_modules).target_modules is None


@pytest.mark.parametrize("initialisation", [None, True, False, "gaussian", "eva", "orthogonal"])
def test_an_initialisation_that_leaves_the_base_alone_is_taken(initialisation: object) -> None:
    assert parse(init_lora_weights=initialisation).lora_rank == 3


def test_settings_that_are_off_are_taken() -> None:
    off: dict[str, Any] = {
        "use_dora": False,
        "modules_to_save": None,
        "layer_replication": [],
        "some_future_setting": None,
    }
    assert parse(**off).lora_rank == 3


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "self_attn.q_proj",
        "1.self_attn.q_proj",
        KEY,
        "^" + KEY,
        "^q_proj",
        "proj",
        "k_proj",
        "11.self_attn.q_proj",
        "self_attn",
        "self.attn.q_proj",
        "x." + KEY,
        ".q_proj",
        "..self_attn.q_proj",
        "." * len(KEY),
    ],
)
def test_patterns_match_as_peft_matches_them(pattern: str) -> None:
    ranks = {pattern: 9}
    assert parse(rank_pattern=ranks).rank_of(KEY) == ranks.get(get_pattern_key(ranks.keys(), KEY), 3)


def test_the_first_pattern_that_matches_wins() -> None:
    config = parse(alpha_pattern={"self_attn.q_proj": 1, "q_proj": 2})
    assert config.scaling_of(KEY) == pytest.approx(1 / 3)


def test_rslora_divides_by_the_root_of_the_modules_own_rank() -> None:
    assert parse(use_rslora=True, rank_pattern={"q_proj": 16}).scaling_of(KEY) == 6 / 4
