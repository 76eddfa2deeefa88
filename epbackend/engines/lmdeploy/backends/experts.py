"""What every backend of ours does with LMDeploy's requests for experts."""

from __future__ import annotations

from typing import Any

from lmdeploy.pytorch.backends.base import BuildSpec, ImplT

from epbackend.engines.lmdeploy.operators import expert_operator


class OurExperts:
    """Stands before the backend of a device: its experts are ours, all else is the device's."""

    @classmethod
    def build_op(cls, spec: BuildSpec[ImplT], *, enable_deterministic: bool = False) -> Any:
        """Raises ConfigError for experts in a form that cannot be spread over ranks."""
        experts = expert_operator(spec, device=cls.get_name())  # type: ignore[attr-defined]
        return experts or super().build_op(spec, enable_deterministic=enable_deterministic)  # type: ignore[misc]
