"""Prepare the schema, centrally, before any run: once after each deployment, harmless at any time.

    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/srv/msm/ray_token        # as on the head: a submission sends no token otherwise
    ray job submit --address http://127.0.0.1:8265 --working-dir . \\
        --runtime-env-json '{"env_vars": {"MSM_HOME": "/srv/msm"}}' -- python jobs/prepare_storage.py --file fleet.yaml

The working directory is copied to the cluster: jobs/, msm_core/, msm_ray/, migrations/ and the fleet file are enough. `python` is the
one that the head finds on its PATH. The database address is read on the cluster (MSM_DATABASE_URL or MSM_DATABASE_URL_FILE in the
environment in which `ray start` was called, or the url file under MSM_HOME), never sent. The role needs the right to create tables; the
role of the nightly run does not. The exit code is that of `msm-ray prepare`: 3 when single
price tables could not be made. Whatever is not 0 shows as a failed job with the reason in its log.
"""

import argparse
import sys
from pathlib import Path

from msm_core.data_nodes.world import price_sources_of
from msm_core.database import get_engine
from msm_core.errors import MsmError
from msm_ray.cli_prepare import EXIT_PARTIAL
from msm_ray.console import configure_logging, tell_error
from msm_ray.fleet import load_fleet
from msm_ray.layout import wish
from msm_ray.prepare import lay_out, prepare
from msm_ray.store import store_fleet, stored_price_sources


def prepare_storage(file: Path | None, partition_by_year: bool = False, partitions: int | None = None) -> int:
    wish(partition_by_year, partitions)  # refused before anything is made
    engine, fleet = get_engine(), load_fleet(file) if file else None
    done = prepare(engine, price_sources_of(fleet.portfolios) if fleet else stored_price_sources(engine))
    stored = store_fleet(engine, fleet) if fleet else None
    made = lay_out(engine, yearly=partition_by_year, partitions=partitions)  # the calendars that were stored say of which years
    print(f"{len(done.pending) + len(made)} revisions and tables applied")
    if stored is not None:
        print(f"{stored} configurations new or changed")
    for problem in done.problems:
        print(f"not prepared: {problem}", file=sys.stderr)
    return EXIT_PARTIAL if done.problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--file",
        type=Path,
        help="fleet.yaml whose configurations are stored, and whose price tables are made; default: those of the stored fleet",
    )
    parser.add_argument(
        "--partition-by-year", action="store_true", help="give weights, signals and values a partition per year; only while they are empty"
    )
    parser.add_argument(
        "--partitions",
        type=int,
        metavar="N",
        help="spread weights, signals and values over N partitions by portfolio (or signal), 2 to 64: parallel first loads write faster; "
        "only while they are empty",
    )
    arguments = parser.parse_args()
    configure_logging(verbose=False)
    try:
        return prepare_storage(arguments.file, arguments.partition_by_year, arguments.partitions)
    except MsmError as error:
        return tell_error(error)


if __name__ == "__main__":
    sys.exit(main())
