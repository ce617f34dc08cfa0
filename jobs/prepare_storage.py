"""Prepare the schema, centrally, before any run: once after each deployment, harmless at any time.

    ray job submit --address http://127.0.0.1:8265 --working-dir . \\
        --runtime-env-json '{"env_vars": {"MSM_HOME": "/srv/msm"}}' -- python jobs/prepare_storage.py --file fleet.yaml

The database address is read on the cluster (MSM_DATABASE_URL, MSM_DATABASE_URL_FILE, or the url file under MSM_HOME), never sent. The
role needs the right to create tables; the role of the nightly run does not.
"""

import argparse
import sys
from pathlib import Path

from msm_core.data_nodes.planning import price_sources_of
from msm_core.database import get_engine
from msm_ray.fleet import load_fleet
from msm_ray.prepare import prepare
from msm_ray.store import store_fleet, stored_price_sources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--file",
        type=Path,
        help="fleet.yaml whose configurations are stored, and whose price tables are made; default: those of the stored fleet",
    )
    arguments = parser.parse_args()
    engine, fleet = get_engine(), load_fleet(arguments.file) if arguments.file else None
    done = prepare(engine, price_sources_of(fleet.portfolios) if fleet else stored_price_sources(engine))
    print(f"{len(done.pending)} revisions and tables applied")
    if fleet:
        print(f"{store_fleet(engine, fleet)} configurations new or changed")
    if done.problems:
        sys.exit("not prepared: " + "; ".join(done.problems))


if __name__ == "__main__":
    main()
