"""What the README shows runs as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

import msm_core

README = Path(__file__).parents[1] / "README.md"

DOCUMENT_SNIPPET = """
import msm

from msm.api.calendars import Calendar
from msm.api.portfolios import Portfolio

msm.start_engine(models=["Calendar", "CalendarDate", "CalendarSession", "Portfolio"])

calendar = Calendar.create_from_pandas_calendar(
    source_identifier="24/7",
    unique_identifier="CRYPTO_24_7",
    display_name="Crypto 24/7",
    valid_from="2026-05-25",
    valid_to="2026-05-25",
    timezone="UTC",
)

portfolio = Portfolio.upsert(
    unique_identifier="btc-eth-target",
    calendar_uid=calendar.uid,
    calendar_name=calendar.unique_identifier,
)
"""  # portfolios-concept.md, "Key Contracts", to the letter


def run_code(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code, "snippet", "exec"), names)
    return names


def test_one_minute_of_python(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    run_code(code)
    assert "status='landed', rows=7" in capsys.readouterr().out  # 3 values, 2 trades of 2 assets: eth and btc both rise 10 % on day 3
    with engine.connect() as connection:
        closes = connection.execute(text("SELECT close FROM msm__portfolios ORDER BY time_index")).scalars().all()
    # 1 - 0.00018; then * 1.06, rebalanced: |0.6 - 0.66/1.06| + |0.4 - 0.4/1.06| = 0.045283018867...; then * 1.1 exactly, no trade
    second = 0.99982 * 1.06 * (1 - 0.00018 * 2 * (0.66 / 1.06 - 0.6))
    assert closes == pytest.approx([0.99982, second, second * 1.1], rel=1e-14)


def test_the_documents_first_snippet(engine: Engine) -> None:  # R9-R12
    names = run_code(re.sub(r"\bmsm\b", "msm_core", DOCUMENT_SNIPPET))
    again = run_code(re.sub(r"\bmsm\b", "msm_core", DOCUMENT_SNIPPET))
    assert names["portfolio"].uid == again["portfolio"].uid
    assert names["portfolio"].calendar_uid == names["calendar"].uid


def test_version_is_the_package_s() -> None:
    pyproject = README.with_name("pyproject.toml").read_text()
    assert f'version = "{msm_core.__version__}"' in pyproject
