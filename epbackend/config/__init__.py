"""The configuration: the only place that reads user settings.

`EPConfig` is everything a deployment sets; `EngineSettings` is the part of it that goes to LMDeploy's engine,
`PlacementSettings` the part that says where experts live.

    config = EPConfig.load("configs/cpu-demo.yaml")     # or .json, a MindIE config.json, or a dict
    config.dispatch_settings("prefill")                 # what the data path of one phase needs

Fields (`schema`) <- rules between them (`checks`) <- `EPConfig` (`ep_config`), which loads and validates. Beside them
`issues` words the errors, `files` reads YAML and JSON, `mindie` translates MindIE's file, `lmdeploy_fields` knows
LMDeploy's own config, and `docs` describes every setting. Nothing here imports torch or LMDeploy.
"""

from epbackend.config.ep_config import EPConfig
from epbackend.config.issues import ConfigWarning
from epbackend.config.schema import EngineSettings, PhaseLevels, PhaseSplits, PlacementSettings

__all__ = ["ConfigWarning", "EPConfig", "EngineSettings", "PhaseLevels", "PhaseSplits", "PlacementSettings"]
