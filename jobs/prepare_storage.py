"""Prepare the schema, centrally, before any run: once after each deployment, harmless at any time.

    ray job submit --address http://127.0.0.1:8265 --working-dir . \\
        --runtime-env-json '{"env_vars": {"MSM_HOME": "/srv/msm"}}' -- python jobs/prepare_storage.py --file fleet.yaml

The database address is read on the cluster (MSM_DATABASE_URL, MSM_DATABASE_URL_FILE, or the url file under MSM_HOME), never sent. The
role needs the right to create tables; the role of the nightly run does not.
"""

import argparse
from pathlib import Path

from msm_core.database import get_engine
from msm_ray.fleet import load_fleet
from msm_ray.prepare import prepare
from msm_ray.store import store_fleet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="fleet.yaml whose configurations are stored too")
    arguments = parser.parse_args()
    engine = get_engine()
    done = prepare(engine)
    print(f"{len(done.pending)} revisions applied")
    if arguments.file:
        print(f"{store_fleet(engine, load_fleet(arguments.file))} configurations new or changed")


if __name__ == "__main__":
    main()
