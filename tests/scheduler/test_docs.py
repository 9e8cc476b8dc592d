"""docs/scheduling.md lists every setting, with its default; the options are the same."""

import re
from dataclasses import MISSING, fields

from scheduler.config import SchedulerConfig
from scheduler.core.settings import Settings
from tests.checkout import read

ROW = re.compile(r"^\| `(\w+)` \| ([^|]+) \| ([^|]*) \| ([^|]+) \|$", re.MULTILINE)
# Numbers without a unit, and names.
UNITLESS = {"policy", "tenant_weights", "spill_ratio"}


def documented() -> dict[str, tuple[str, str]]:
    """Setting -> (default, unit) as the document has them."""
    section = read("docs/scheduling.md").split("## Settings")[1]
    return {name: (default.strip("` "), unit.strip()) for name, default, unit, _ in ROW.findall(section)}


def test_the_document_lists_every_setting_and_no_other() -> None:
    assert list(documented()) == [spec.name for spec in fields(Settings)]


def test_the_document_has_the_defaults() -> None:
    for spec in fields(Settings):
        text = documented()[spec.name][0].replace(",", "")
        if spec.default is MISSING:
            assert text == "none"
        elif isinstance(spec.default, str):
            assert text == spec.default
        else:
            assert float(text) == spec.default, spec.name


def test_every_number_has_a_unit() -> None:
    assert {name for name, (_, unit) in documented().items() if not unit} == UNITLESS


def test_every_setting_is_an_option_with_the_same_default() -> None:
    assert SchedulerConfig().settings == Settings()


def test_tenants_are_read_from_an_option() -> None:
    config = SchedulerConfig(tenant_weights="gold=4,silver=2", tenant_ttft_slo_seconds="gold=0.5")
    assert config.settings.tenant_weights == {"gold": 4.0, "silver": 2.0}
    assert config.settings.slo_seconds("gold", None) == 0.5
    assert config.settings.slo_seconds("gold", 2.0) == 2.0
    assert config.settings.slo_seconds("silver", None) is None
