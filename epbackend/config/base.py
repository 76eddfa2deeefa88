"""What every section of the configuration shares."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of settings: no unknown key, no silent conversion, a description on every field."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class ConfigWarning(UserWarning):
    """A valid setting without effect where it stands, or one of a MindIE file that we do not use."""
