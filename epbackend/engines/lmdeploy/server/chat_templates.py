"""The chat template that a user names: one of LMDeploy's, a JSON file of its settings, or a Jinja file as for vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lmdeploy import ChatTemplateConfig
from lmdeploy.model import MODELS, BaseChatTemplate, HFChatTemplate

from epbackend.errors import ConfigError, did_you_mean


class JinjaChatTemplate(HFChatTemplate):
    """The tokenizer's own way to write a conversation down, by another text."""

    def __init__(self, model_path: str, text: str, trust_remote_code: bool = False) -> None:
        self._text = text
        super().__init__(model_path, trust_remote_code)

    def _user_instruction(self) -> tuple[str, str, list[dict[str, str]], str]:
        # The first thing that is asked of the tokenizer once it is there.
        self.tokenizer.chat_template = self._text
        return super()._user_instruction()


@dataclass
class JinjaChatTemplateConfig(ChatTemplateConfig):
    """What LMDeploy makes a `JinjaChatTemplate` of, in whatever process; `model_name` is for messages."""

    text: str = ""

    def chat_template(self, trust_remote_code: bool = False) -> BaseChatTemplate:
        return JinjaChatTemplate(self.model_path or "", self.text, trust_remote_code)


def chat_template_config(name: str, model_path: str, trust_remote_code: bool = False) -> ChatTemplateConfig:
    """LMDeploy's config of a chat template: a name that it knows, a `.json` file of this config, or a Jinja file.

    Raises:
        ConfigError: there is no such template, or it cannot write down a conversation with this model.
    """
    config = _read(name, model_path)
    try:
        config.chat_template(trust_remote_code).messages2prompt([{"role": "user", "content": "Hello"}])
    except Exception as error:  # whatever a template's code runs into
        said = str(error).removeprefix("Try apply_chat_template failed: ")
        raise ConfigError(f"chat_template: {name} cannot be used with {model_path}: {said}") from None
    return config


def _read(name: str, model_path: str) -> ChatTemplateConfig:
    file = Path(name)
    if not file.is_file():
        if name in MODELS.module_dict:
            return ChatTemplateConfig(name, model_path)
        known = sorted(MODELS.module_dict)
        raise ConfigError(
            f"chat_template: {name} is no file, and none of {', '.join(known)}{did_you_mean(name, known)}"
        )
    try:
        if file.suffix != ".json":
            return JinjaChatTemplateConfig(name, model_path, text=file.read_text(encoding="utf-8"))
        config = ChatTemplateConfig.from_json(name)
    except OSError as error:
        raise ConfigError(f"chat_template: {name} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"chat_template: {name} holds none of LMDeploy's templates: {error}") from None
    config.model_path = config.model_path or model_path
    return config
