"""What the README shows runs as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

import msm_core

README = Path(__file__).parents[1] / "README.md"


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def run_code(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code, "snippet", "exec"), names)
    return names


def test_one_minute_of_python(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    run_code(snippets()[0])
    assert "status='landed', rows=7" in capsys.readouterr().out  # 3 values, 2 trades of 2 assets: eth and btc both rise 10 % on day 3
    with engine.connect() as connection:
        closes = connection.execute(text("SELECT close FROM msm__portfolios ORDER BY time_index")).scalars().all()
    # 1 - 0.00018; then * 1.06, rebalanced: |0.6 - 0.66/1.06| + |0.4 - 0.4/1.06| = 0.045283018867...; then * 1.1 exactly, no trade
    second = 0.99982 * 1.06 * (1 - 0.00018 * 2 * (0.66 / 1.06 - 0.6))
    assert closes == pytest.approx([0.99982, second, second * 1.1], rel=1e-14)


def test_accounts_go_on_from_there(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_code("\n".join(snippets()))
    capsys.readouterr()
    expanded = names["expand_portfolio_target_positions"](
        names["account_targets"](as_of=names["as_of"]), names["CurrentWeights"](names["as_of"])
    )
    # rebalanced on that very day: 0.6 and 0.4 of a million
    assert sorted(expanded["constant_notional_exposure"]) == pytest.approx([400_000, 600_000], rel=1e-12)
    # 600 000 / 121 = 4 958.7 btc are asked for and 4 000 held; 400 000 / 55 = 7 272.7 eth of 9 000
    residual = names["plan"].residual.set_index("asset_identifier")["residual_quantity"]
    assert residual.to_dict() == pytest.approx({"asset-btc": 0.0, "asset-eth": 9_000 - 400_000 / 55}, abs=1e-9)


def test_version_is_the_package_s() -> None:
    pyproject = README.with_name("pyproject.toml").read_text()
    assert f'version = "{msm_core.__version__}"' in pyproject
