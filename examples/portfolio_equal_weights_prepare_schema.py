"""Make the tables of the equal-weights example: first of two commands.

1. attaches the static schema: registry, catalogue, storages that everybody has
2. reads uid and cadence of the price source, ExternalPricesTS, from the catalogue
3. derives the storage of the interpolated prices: four components make its identity, and name its table
4. makes that table where there is none

Run it as often as you like. The database is that of MSM_DATABASE_URL or, without one, the embedded one under MSM_HOME (./.msm), which
is started. The role needs the right to create tables; that of the second command does not.
"""

import argparse
import sys

import portfolio_equal_weights_example as example

from msm_ray.prepare import check, ddl
from msm_ray.session import connect

EXIT_PENDING = 10  # as `msm-ray prepare --check`


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"Then: {example.RUN}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="change nothing; exit 10 when there is something to do")
    only.add_argument("--sql", action="store_true", help="print the DDL that is pending, and change nothing")
    arguments = parser.parse_args()
    engine = connect()
    if arguments.sql:
        sys.stdout.write(ddl(engine, [example.price_source()]))
    elif arguments.check:
        found = check(engine, [example.price_source()])
        for what in ("pending", "missing", "drifted", "problems"):
            example.say(what, ", ".join(getattr(found, what)) or "none")
        sys.exit(0 if found.is_clean and not found.problems else EXIT_PENDING)
    else:
        example.prepare_static_schema(engine)
        source = example.read_source()
        example.derive_storage(source)
        example.prepare_configured_storage(engine)
        example.say("next", example.RUN)


if __name__ == "__main__":
    example.main_of_script(main)
