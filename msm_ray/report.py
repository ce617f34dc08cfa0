"""What a run looks like to people: growth per portfolio, and value curves in one offline HTML file."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from psycopg import sql
from sqlalchemy import Connection

from msm_core.copying import fetch
from msm_core.models import PortfoliosStorage

CURVES_MAX = 200  # above that a picture helps nobody, and the file grows by 8 kB a curve
DAYS_PER_YEAR = 365.25

PAGE = jinja2.Template(
    """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .9rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } caption { text-align: left; color: #666 }
</style></head><body><h1>{{ title }}</h1>
<p>{% for name, value in facts.items() %}<b>{{ value }}</b> {{ name }}{{ " · " if not loop.last }}{% endfor %}</p>
{{ chart }}
<table><caption>Best and worst by annual growth: value ^ (365.25 / days) - 1, fees included.</caption>
<tr><th>portfolio</th><th>from</th><th>to</th><th>value of 1.0</th><th>a year</th></tr>
{% for p in extremes %}<tr><td>{{ p.identifier }}</td><td>{{ p.first.date() }}</td><td>{{ p.last.date() }}</td>
<td>{{ "%.4f"|format(p.close) }}</td><td>{{ "%+.2f %%"|format(100 * p.growth) }}</td></tr>{% endfor %}</table>
</body></html>""",
    autoescape=True,
)


@dataclass(frozen=True)
class Performance:
    """Growth of one portfolio over its stored life; `growth` is a fraction per year, from 1.0 before the first purchase."""

    identifier: str
    first: datetime
    last: datetime
    close: float

    @property
    def growth(self) -> float:
        years = max((self.last - self.first).days, 1) / DAYS_PER_YEAR
        return self.close ** (1 / years) - 1


def read_performance(connection: Connection, identifiers: list[str]) -> list[Performance]:
    """Best first."""
    statement = sql.SQL("""
        SELECT u.id, f.time_index, l.time_index, l.close FROM unnest(%(ids)s::text[]) u(id)
        CROSS JOIN LATERAL (SELECT time_index FROM {t} v WHERE v.portfolio_identifier = u.id ORDER BY time_index LIMIT 1) f
        CROSS JOIN LATERAL (SELECT time_index, close FROM {t} v WHERE v.portfolio_identifier = u.id ORDER BY time_index DESC LIMIT 1) l
    """).format(t=sql.Identifier(PortfoliosStorage.__tablename__))
    found = [Performance(*row) for row in fetch(connection, statement, {"ids": identifiers})]
    return sorted(found, key=lambda p: (-p.growth, p.identifier))


def write_report(connection: Connection, path: Path, title: str, performance: list[Performance], facts: dict[str, Any]) -> None:
    """One HTML file that needs no network: value curves (month ends, logarithmic) of at most 200 portfolios, best and worst."""
    shown = performance if len(performance) <= CURVES_MAX else performance[: CURVES_MAX // 2] + performance[-CURVES_MAX // 2 :]
    chart = _chart(connection, [p.identifier for p in shown])
    extremes = performance if len(performance) <= 20 else performance[:10] + performance[-10:]
    path.write_text(PAGE.render(title=title, facts=facts, chart=Markup(chart), extremes=extremes))


def _chart(connection: Connection, identifiers: list[str]) -> str:
    statement = sql.SQL("""
        SELECT portfolio_identifier, array_agg(time_index ORDER BY time_index), array_agg(close ORDER BY time_index) FROM (
            SELECT DISTINCT ON (portfolio_identifier, date_trunc('month', time_index, 'UTC')) portfolio_identifier, time_index, close
            FROM {t} WHERE portfolio_identifier = ANY(%(ids)s)
            ORDER BY portfolio_identifier, date_trunc('month', time_index, 'UTC'), time_index DESC) m GROUP BY 1
    """).format(t=sql.Identifier(PortfoliosStorage.__tablename__))
    figure = go.Figure()
    for identifier, times, closes in fetch(connection, statement, {"ids": identifiers}):
        curve = go.Scattergl(x=times.astype("datetime64[D]"), y=closes.round(6), name=identifier, mode="lines", line={"width": 1})
        figure.add_trace(curve)
    figure.update_layout(height=620, template="plotly_white", yaxis={"type": "log", "title": "value of 1.0"}, hovermode="closest")
    return figure.to_html(full_html=False, include_plotlyjs=True)
