"""Gives an editable install what `train.py` needs, so that `pip install -e . && python train.py` works."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CheckoutHook(BuildHookInterface):
    """Adds the extras that `pyproject.toml` names for checkouts to the dependencies of editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the dependencies; a wheel (`version` is `standard`) is left as it is."""
        if version == "editable":
            extras = self.metadata.core.optional_dependencies
            build_data["dependencies"] += [one for extra in self.config["checkout"] for one in extras[extra]]
