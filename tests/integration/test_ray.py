"""Ray itself: the same bits as in one process, and clear ends for what can hang."""

import stat
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from sqlalchemy import Engine

from msm_core.database import transaction
from msm_core.errors import RayUnavailable
from msm_core.verification import verify
from msm_ray import demo, executors
from msm_ray.executors import LocalExecutor, RayExecutor
from msm_ray.run import Options, run_fleet


def test_ray_and_one_process_store_the_same_bits(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # R97, R98
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    demo.load(engine, lambda text: None)
    configurations = demo.fleet(engine, 20)
    ray = RayExecutor(workers=2)
    try:
        landed = run_fleet(engine, configurations, ray, demo.AS_OF, Options(batch_size=3))
        with transaction(engine, read_only=True) as connection:
            on_ray = verify(connection)
        local = run_fleet(engine, configurations, LocalExecutor(), demo.AS_OF, Options(full_refresh=True))
        with transaction(engine, read_only=True) as connection:
            in_process = verify(connection)
    finally:
        ray.close()
    assert (landed.counts()["landed"], local.counts()["landed"]) == (20, 20)
    assert on_ray == in_process
    assert on_ray.violations == ()
    token = tmp_path / "ray_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text()) == 64


def test_a_fleet_with_nothing_to_do_does_not_start_ray(engine: Engine) -> None:
    executor = RayExecutor()
    report = run_fleet(engine, [], executor, demo.AS_OF)
    executor.close()
    assert report.results == ()
    assert "_ray" not in vars(executor)


def test_a_start_that_hangs_ends_in_a_clear_error() -> None:
    with pytest.raises(RayUnavailable, match=r"no answer within 0 s.*--executor local"):
        executors._Starter(threading.Event().wait, seconds=0.2)  # type: ignore[arg-type]


def test_a_start_that_fails_tells_why() -> None:
    def fail() -> None:
        raise RuntimeError("no room for postgresql://u:canary-secret@h/d")

    with pytest.raises(RayUnavailable, match="RuntimeError: no room") as caught:
        executors._Starter(fail, seconds=5)
    assert "canary-secret" not in str(caught.value)


@pytest.mark.parametrize(("status", "refused"), [(200, True), (401, False)])
def test_a_remote_cluster_without_a_token_is_refused(status: int, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("0.0.0.0", 0), Dashboard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"0.0.0.0:{server.server_port}"
        if refused:
            with pytest.raises(RayUnavailable, match="answers without a token"):
                executors.refuse_open_cluster(address)
            monkeypatch.setenv("MSM_RAY_ALLOW_UNAUTHENTICATED", "1")
        executors.refuse_open_cluster(address)
        executors.refuse_open_cluster(f"127.0.0.1:{server.server_port}")  # loopback is left to its host
    finally:
        server.shutdown()
