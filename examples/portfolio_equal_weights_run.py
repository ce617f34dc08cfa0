"""Run the equal-weights example: second of two commands, after portfolio_equal_weights_prepare_schema.py.

1. finds the tables that the first command made; makes none, and exits 2 where one is missing
2. registers calendar, assets and index; publishes three months of example bars, with gaps, to ExternalPrices
3. interpolates them, runs the signal and the portfolio, and points the Portfolio row at what produced it
4. prints values and, with --html, draws them

Run it again: everything is there, and nothing is written. Virtual funds are not made: they need an account and a policy of their own.
"""

import argparse
from pathlib import Path

import plotly.graph_objects as go
import portfolio_equal_weights_example as example
from plotly.subplots import make_subplots
from sqlalchemy import Engine

from msm_ray.session import connect

SHOWN = 6  # values printed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--html", type=Path, metavar="PATH", help="write a picture of values and weights: one file, no network needed")
    arguments = parser.parse_args()
    engine, configuration = connect(), example.portfolio_configuration()
    storage = example.find_storage(engine)
    calendar = example.register_calendar()
    example.register_assets(calendar)
    index = example.register_index()
    example.publish_bars()
    example.interpolate_bars(engine, storage)
    example.run_portfolio(engine, configuration)
    example.upsert_portfolio(configuration, calendar, index)
    show_values(engine)
    if arguments.html:
        draw(engine, arguments.html)
        example.say("picture", str(arguments.html))


def show_values(engine: Engine) -> None:
    values = example.read_values(engine)
    print(f"\nthe last {SHOWN} of {len(values)} values of {example.PORTFOLIO}; 1.0 is what it had before its first purchase")
    print(values.tail(SHOWN).to_string(formatters={"close": "{:.6f}".format, "return": "{:+.4%}".format}))


def draw(engine: Engine, path: Path) -> None:
    """Values above; below, weights at each trade: they drift with prices, and are set right."""
    values, weights = example.read_values(engine), example.read_weights(engine)
    figure = make_subplots(rows=2, shared_xaxes=True, row_heights=[0.6, 0.4], vertical_spacing=0.06)
    figure.add_trace(go.Scatter(x=values.index, y=values["close"], name="value of 1.0"), row=1, col=1)
    for asset, trades in weights.groupby("asset_identifier"):
        before_and_after = trades[["weight_before", "weight"]].stack().iloc[1:]  # before the purchase there was nothing
        times = before_and_after.index.get_level_values("time_index")
        figure.add_trace(go.Scatter(x=times, y=before_and_after, name=str(asset)), row=2, col=1)
    figure.update_layout(title=example.PORTFOLIO, template="plotly_white", hovermode="x unified", height=640)
    figure.update_yaxes(title="value", row=1, col=1)
    figure.update_yaxes(title="weight", tickformat=".0%", row=2, col=1)
    figure.write_html(path, include_plotlyjs=True)


if __name__ == "__main__":
    example.main_of_script(main)
