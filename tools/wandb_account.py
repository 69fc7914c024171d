"""Whether a run can log to Weights & Biases, found out before any rank starts; the package itself is not imported."""

from __future__ import annotations

import configparser
import importlib.util
import netrc
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from reflectron.engine.config import Config

_WITHOUT_KEY = ("offline", "disabled", "dryrun")
_KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


def check_wandb(config: Config, env: Mapping[str, str] = os.environ) -> None:
    """See that package and key are there, if the run logs at all.

    Raises:
        ValueError: naming what is missing.
    """
    project = config.train.wandb_project
    if project is None or int(env.get("RANK") or env.get("SLURM_PROCID") or 0) > 0:
        return
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"train.wandb_project is {project!r}, but the package wandb is not installed: "
            "pip install 'reflectron[wandb]'"
        )
    settings = _settings(env)
    mode = env.get("WANDB_MODE") or settings.get("mode", "online")
    if mode in _WITHOUT_KEY or env.get("WANDB_DISABLED", "").lower() in ("1", "true"):
        return
    if any(env.get(name) for name in _KEYS) or settings.get("api_key") or _in_netrc(env, settings):
        return
    raise ValueError(
        f"train.wandb_project is {project!r}, but there is no API key of Weights & Biases: run `wandb login`, set "
        "WANDB_API_KEY, or set WANDB_MODE=offline"
    )


def _settings(env: Mapping[str, str]) -> dict[str, str]:
    """What wandb's own settings files say; the one of the working directory wins."""
    found = configparser.ConfigParser(interpolation=None)
    home = Path(env.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    with suppress(configparser.Error, UnicodeDecodeError):
        found.read([home / "settings", Path(env.get("WANDB_DIR") or ".") / "wandb" / "settings"])
    return dict(found["default"]) if found.has_section("default") else {}


def _in_netrc(env: Mapping[str, str], settings: Mapping[str, str]) -> bool:
    server = env.get("WANDB_BASE_URL") or settings.get("base_url") or "https://api.wandb.ai"
    files = [env["NETRC"]] if env.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for file in files:
        with suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            if netrc.netrc(str(Path(file).expanduser())).authenticators(urlsplit(server).hostname or server):
                return True
    return False
