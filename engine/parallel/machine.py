"""Refuses what this machine cannot do, before a process or a byte of memory is taken for it."""

from __future__ import annotations

from packaging.version import Version

from reflectron.engine.config import Config
from reflectron.engine.files import installed_version

# The first whose FusedAdam keeps moments in bfloat16; FP8 by current scaling is older. megatron-core 0.16.1 asks for it
# when state is offloaded, too.
TRANSFORMER_ENGINE = "2.3"


def check_machine(config: Config) -> None:
    """Check the optimizer's keys that not every machine can follow; torch is imported only if one is set.

    Raises:
        ValueError: naming the key and what is missing.
    """
    for key in config.optimizer.needs_cuda:
        from reflectron.engine.parallel.process_groups import device_type

        value = getattr(config.optimizer, key)
        if device_type(config.parallel) == "cpu":
            raise ValueError(
                f"optimizer.{key} is {value!r}, expected the default: it needs CUDA, and ranks run on the CPU"
            )
        found = _transformer_engine()
        if found is None or found < Version(TRANSFORMER_ENGINE):
            raise ValueError(
                f"optimizer.{key} is {value!r}, expected the default: it needs transformer-engine "
                f"{TRANSFORMER_ENGINE} or newer, and {found or 'none'} is installed"
            )


def _transformer_engine() -> Version | None:
    version = installed_version("transformer-engine")
    return None if version is None else Version(version)
