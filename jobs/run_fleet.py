"""Run the stored fleet, or that of a file, on the cluster that this job was submitted to.

    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/srv/msm/ray_token        # as on the head: a submission sends no token otherwise
    ray job submit --address http://127.0.0.1:8265 --submission-id nightly-2026-11-20 --working-dir . \\
        --runtime-env-json '{"env_vars": {"MSM_HOME": "/srv/msm"}}' -- python jobs/run_fleet.py --as-of 2026-11-20

The working directory is copied to the cluster: jobs/, msm_core/, msm_ray/ and migrations/ are enough, and a fleet file if one is named.
`python` is the one that the head finds on its PATH. The shell's environment does not travel with a job; of ours only the path MSM_HOME
needs to. The database address is read on each node, never sent: from MSM_DATABASE_URL or MSM_DATABASE_URL_FILE in the environment in
which `ray start` was called there, or the url file under MSM_HOME, the same path on all nodes. A second submission with the same id is
refused by Ray; a run repeated under another id writes nothing twice. The exit code is that of `msm-ray run`, so a partial night (3)
shows as a failed job with its report in the log; `ray job submit` itself then ends with 1.
"""

import argparse
import json
import sys
from pathlib import Path

from msm_core.database import get_engine
from msm_core.errors import MsmError
from msm_ray.cli_run import result_document
from msm_ray.console import configure_logging, tell_error
from msm_ray.events import HELP
from msm_ray.executors import make_executor
from msm_ray.run import Options, RunReport, run_fleet
from msm_ray.session import choose_portfolios, parse_as_of
from msm_ray.watch import RunOutput, Watcher, watching


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="fleet.yaml; default: what `prepare` stored")
    parser.add_argument("--select", action="append", help="portfolio:ew-*, tag:core, status:failed ...; repeat = or")
    parser.add_argument("--as-of", help="use nothing later: 2026-11-20 or 2026-11-20T21:00:00Z; default: now")
    parser.add_argument("--full-refresh", action="store_true", help="compute from scratch, replacing each portfolio atomically")
    parser.add_argument("--batch-size", type=int, help="most nodes per batch; default: by work")
    parser.add_argument("--task-timeout", type=float, default=1800.0, help="wall-clock limit of one batch, seconds")
    parser.add_argument("--metrics-file", type=Path, help="leave figures for Prometheus here, NAME.prom; default: MSM_METRICS_FILE")
    parser.add_argument("--output", choices=("json", "ndjson"), default="json", help="one line at the end, or one per event (below)")
    return parser.parse_args()


def run(arguments: argparse.Namespace, watcher: Watcher) -> RunReport:
    engine = get_engine()
    configurations, signals, unreadable = choose_portfolios(engine, arguments.file, arguments.select)
    options = Options(
        batch_size=arguments.batch_size,
        full_refresh=arguments.full_refresh,
        signals_selected=signals,
        unreadable=unreadable,
        arguments={"job": "run_fleet", "select": arguments.select},
    )
    executor = make_executor("ray", arguments.task_timeout)
    try:
        return run_fleet(engine, configurations, executor, parse_as_of(arguments.as_of), options, watcher)
    finally:
        executor.close()


def main() -> int:
    arguments = parse_arguments()
    configure_logging(verbose=False)
    try:
        with watching(RunOutput(arguments.output), arguments.metrics_file) as watcher:
            report = run(arguments, watcher)
    except MsmError as error:
        return tell_error(error, as_json=arguments.output == "json")
    if arguments.output == "json":
        print(json.dumps(result_document(report)))
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
