"""[security]: who may call this node, and under which names.

Law of this file: declarations; a key is a secret from the moment in which it is read, and no message shows it.
"""

from __future__ import annotations

from pydantic import Field, SecretStr, field_validator, model_validator

from tars.config_schema.section import Section


class ApiKey(Section):
    """[[security.api_key]]: who may call. In the environment: `TARS_SECURITY_API_KEY=name:key,name:key`."""

    name: str = Field(min_length=1, max_length=63, description="Who holds it: appears in logs, the key never does.")
    key: SecretStr = Field(
        strict=False,
        description="At least 16 characters: 16 random ones of base64 hold 96 bits, beyond guessing over a network.",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_and_key(cls, value: object) -> object:
        if isinstance(value, str):
            name, separator, key = value.partition(":")
            return {"name": name, "key": key} if separator else {"name": name}
        return value

    @field_validator("key")
    @classmethod
    def _long_enough(cls, value: SecretStr) -> SecretStr:
        if len(value.get_secret_value()) < 16:
            raise ValueError("a key needs at least 16 characters")
        if not value.get_secret_value().isascii() or not value.get_secret_value().isprintable():
            raise ValueError("a key may hold only printable ASCII: it travels in an HTTP header")
        return value


class SecuritySection(Section):
    """[security]: who may call this node, and under which names."""

    api_key: tuple[ApiKey, ...] = Field(
        (),
        strict=False,
        description="Keys of this node alone, each an admin's. Keys that work on every node of the mesh: `tars key new`. A node that "
        "listens beyond loopback and has none makes an admin key on its first start and prints it once.",
    )
    allowed_hosts: tuple[str, ...] = Field(
        (),
        strict=False,
        description="Host headers to accept beside the address that the node listens on (DNS rebinding).",
    )
    allowed_origins: tuple[str, ...] = Field(
        (),
        strict=False,
        description="Web pages that may call from a browser, such as https://chat.example.org; never *.",
    )

    @field_validator("api_key")
    @classmethod
    def _one_key_each(cls, value: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        if len({key.name for key in value}) < len(value):
            raise ValueError("two API keys have the same name")
        return value

    @field_validator("allowed_hosts", "allowed_origins")
    @classmethod
    def _exact(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any("*" in entry or not entry for entry in value):
            raise ValueError("entries are compared exactly: no * and no empty ones")
        return value
