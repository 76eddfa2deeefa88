"""The configuration: the only place that reads user settings.

`EPConfig` is everything a deployment sets; `EngineSettings` is the part of it that goes to LMDeploy's engine,
`PlacementSettings` the part that says where experts live.

    config = EPConfig.load("configs/cpu-demo.yaml")     # or .json, a MindIE config.json, or a dict
    config.dispatch_settings("prefill")                 # what the data path of one phase needs

One idea a file: `settings`, `placement` and `engine` hold the fields, `parallel` says which dp/tp/ep fit together,
`rules` finds contradictions and settings without effect, `problems` words the errors, `files` reads YAML and JSON,
`mindie` and `mindie_sizes` translate MindIE's file.  Nothing here imports torch or LMDeploy.
"""

from epbackend.config.base import ConfigWarning
from epbackend.config.engine import EngineSettings
from epbackend.config.placement import PhaseSplits, PlacementSettings
from epbackend.config.settings import EPConfig, PhaseLevels

__all__ = ["ConfigWarning", "EPConfig", "EngineSettings", "PhaseLevels", "PhaseSplits", "PlacementSettings"]
