"""Settings come from the environment only; a configuration file never holds a secret."""

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """What the environment says, read afresh at each call of `Settings()`.

    database_url             `MSM_DATABASE_URL`: any Postgres >= 15; no server of ours is started
    database_url_file        `MSM_DATABASE_URL_FILE`: a file (mode 0600) holding that address, for secrets mounted as files
    home                     `MSM_HOME`: state of this installation (embedded database, tokens); default `./.msm`
    auto_register_namespace  `MSM_AUTO_REGISTER_NAMESPACE`: prefix of identifiers and suffix of tables; empty = default namespace
    pg_bin                   `MSM_PG_BIN`: folder of initdb and postgres, instead of the embedded wheel
    ray_allow_unauthenticated  `MSM_RAY_ALLOW_UNAUTHENTICATED`: use a remote Ray cluster although it asks for no token
    metrics_file             `MSM_METRICS_FILE`: where a run leaves its figures for Prometheus, a .prom file (msm_ray/metrics.py)
    """

    model_config = SettingsConfigDict(env_prefix="MSM_", extra="ignore")

    database_url: SecretStr | None = None
    database_url_file: Path | None = None
    home: Path = Field(default_factory=lambda: Path(".msm"))
    auto_register_namespace: str = ""
    pg_bin: Path | None = None
    ray_allow_unauthenticated: bool = False
    metrics_file: Path | None = None

    @property
    def state_path(self) -> Path:
        return self.home.expanduser().resolve()
