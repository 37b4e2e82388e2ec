"""Precedence, and messages with file, line and the right key; the shipped configurations."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from tars.config import Config, load_config, variables
from tars.core.types import ModelKind
from tars.errors import ConfigError

NODE_CONFIGS = Path(__file__).parents[1] / "node_configs"
KEY = "0123456789abcdef"


def load(tmp_path: Path, text: str, **environment: str) -> Config:
    file = tmp_path / "node.toml"
    file.write_text(text)
    return load_config(file, environment=environment)


def refusal(tmp_path: Path, text: str, **environment: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, **environment)
    return caught.value.message


# --- precedence -----------------------------------------------------------------------------------------------------


def test_the_command_line_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    text = '[node]\nlisten = "127.0.0.1:1"\n[limits]\nmax_batch = 11\nmax_depth = 12\n'
    (tmp_path / "node.toml").write_text(text)
    config = load_config(
        tmp_path / "node.toml",
        environment={"TARS_NODE_LISTEN": "127.0.0.1:2", "TARS_LIMITS_MAX_BATCH": "22"},
        overrides={"node.listen": "127.0.0.1:3", "node.name": None},
    )
    assert config.node.address.port == 3
    assert (config.limits.max_batch, config.limits.max_depth) == (22, 12)
    assert config.limits.max_concurrent_calls == Config().limits.max_concurrent_calls


def test_every_key_can_be_set_by_a_variable(tmp_path: Path) -> None:
    def leaves(model: type[BaseModel], prefix: str) -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            kind = field.annotation
            below = isinstance(kind, type) and issubclass(kind, BaseModel)
            found += leaves(kind, f"{prefix}_{name.upper()}") if below else [f"{prefix}_{name.upper()}"]
        return found

    assert set(variables()) == {*leaves(Config, "TARS"), "TARS_STATE_DIR"}
    config = load_config(
        environment={
            "TARS_DEVICES_CPU": "off",
            "TARS_NODE_GRACE_SECONDS": "2.5",
            "TARS_NODE_LOG_FORMAT": "json",
            "TARS_DEMO_MODELS": "0",
            "TARS_SECURITY_ALLOWED_HOSTS": "pc1.lan, pc1.tail.net",
            "TARS_SECURITY_API_KEY": f"ops:{KEY},ci:{KEY[::-1]}",
            "TARS_DEPLOY": '[{"model": "phi-2", "slots": 2}]',
            "TARS_MODEL": '[{"name": "mine", "path": "/m.gguf", "kind": "embedding"}]',
            "TARS_NODE_NAME": "",
        }
    )
    assert not config.devices.cpu
    assert config.node.grace_seconds == 2.5
    assert config.node.log_format == "json"
    assert config.demo.models is False
    assert config.security.allowed_hosts == ("pc1.lan", "pc1.tail.net")
    assert [key.name for key in config.security.api_key] == ["ops", "ci"]
    assert config.deploy[0].slots == 2
    assert config.model[0].kind is ModelKind.EMBEDDING
    assert config.node.name


def test_the_state_folder_has_a_short_variable_and_follows_the_xdg_default() -> None:
    assert load_config(environment={"TARS_STATE_DIR": "/a"}).node.state_dir == Path("/a")
    assert load_config(environment={"TARS_STATE_DIR": "/a", "TARS_NODE_STATE_DIR": "/b"}).node.state_dir == Path("/b")
    assert load_config(environment={"XDG_STATE_HOME": "/x"}).node.state_dir == Path("/x/tars")
    home = Path("~/.local/state/tars").expanduser()
    assert load_config(environment={"XDG_STATE_HOME": "relative"}).node.state_dir == home
    assert load_config().node.state_dir == home


def test_paths_in_a_file_are_relative_to_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, '[node]\nstate_dir = "state"\n[[model]]\nname = "m"\npath = "models/m.gguf"\n')
    assert config.node.state_dir == tmp_path / "state"
    assert config.model[0].path == tmp_path / "models/m.gguf"
    absolute = load(tmp_path, '[[model]]\nname = "m"\npath = "/models/m.gguf"\n')
    assert absolute.model[0].path == Path("/models/m.gguf")


# --- messages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[node]\n\nlistn = "127.0.0.1:1"\n', "node.toml, line 3: unknown key node.listn. Did you mean listen?"),
        ('listen = "127.0.0.1:1"\n', "node.toml, line 1: unknown key listen. It belongs under [node]."),
        ("[limit]\nmax_batch = 1\n", "node.toml, line 1: unknown key limit. Did you mean limits?"),
        ("[demo]\nzzz = 1\n", "node.toml, line 2: unknown key demo.zzz. Known here: models."),
        (
            '[[deploy]]\nmodel = "a"\n[[deploy]]\nmodel = "b"\nreplica = 2\n',
            "node.toml, line 5: unknown key deploy[1].replica. Did you mean replicas?",
        ),
        ('[node]\ngrace_seconds = "8"\n', "node.toml, line 2: node.grace_seconds must be a number, not '8'."),
        ("[node]\nname = 5\n", 'node.toml, line 2: node.name must be text in quotes ("..."), not 5.'),
        ("[limits]\nmax_batch = 3.5\n", "node.toml, line 2: limits.max_batch must be a whole number, not 3.5."),
        ('[devices]\ncpu = "yes"\n', "node.toml, line 2: devices.cpu must be true or false, not 'yes'."),
        ("[limits]\nmax_batch = true\n", "node.toml, line 2: limits.max_batch must be a whole number, not true."),
        ("node = 3\n", "node.toml, line 1: node must be a table ([...])"),
        ("[deploy]\nmodel = 'a'\n", "node.toml, line 1: deploy must be an array ([...])."),
        ("[[deploy]]\nreplicas = 2\n", "node.toml, line 1: deploy[0].model is missing; it has no default."),
        (
            '[node]\nlog_format = "xml"\n',
            "node.toml, line 2: node.log_format: input should be 'text' or 'json', not 'xml'.",
        ),
        ('[node]\nlisten = "here"\n', 'node.toml, line 2: node.listen: "here" is not host:port'),
        ("[limits]\nmax_batch = 0\n", "greater than or equal to 1, not 0."),
        ("[node]\ngrace_seconds = nan\n", "node.toml, line 2: node.grace_seconds: input should be a finite number"),
        ("[worker]\nbackoff_initial_seconds = 100\n", "node.toml, line 1: worker: backoff_most_seconds is less than"),
    ],
)
def test_a_wrong_key_or_value_is_refused_with_its_line_and_what_is_right(tmp_path: Path, text: str, says: str) -> None:
    assert says in refusal(tmp_path, text)


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    message = refusal(tmp_path, "[limits]\nmax_batch = 0\n[node]\nlistn = 1\nname = 2\n[security]\nkey = 3\n")
    assert [line.partition(": ")[0].rpartition(" ")[2] for line in message.splitlines()] == ["2", "4", "5", "7"]


def test_a_wrong_variable_is_named(tmp_path: Path) -> None:
    message = refusal(tmp_path, "[limits]\nmax_batch = 7\n", TARS_LIMITS_MAX_BATCH="many")
    assert message == "environment variable TARS_LIMITS_MAX_BATCH: limits.max_batch must be a whole number, not 'many'."
    replaced = refusal(tmp_path, '[[deploy]]\nmodel = "a"\n', TARS_DEPLOY='[{"model": "b", "slots": 0}]')
    assert replaced.startswith("environment variable TARS_DEPLOY: deploy[0].slots: ")
    assert "Did you mean TARS_NODE_LISTEN?" in refusal(tmp_path, "", TARS_NODE_LISTN="x")
    assert "Did you mean TARS_LIMITS_MAX_BATCH?" in refusal(tmp_path, "", TARS_LIMIT_MAX_BATCH="9")
    assert load(tmp_path, "", TARS_ENDPOINT="somebody else's").node.name


def test_a_wrong_command_line_value_is_named() -> None:
    with pytest.raises(ConfigError, match=r"command line \(node.listen\): node.listen: \"x\" is not host:port"):
        load_config(overrides={"node.listen": "x"})


@pytest.mark.parametrize(
    "text",
    [
        '[[security.api_key]]\nname = "a"\nkey = "s3cr3t"\n',
        '[[security.api_key]]\nname = "a"\nkey = ["s3cr3t"]\n',
        '[security]\napi_key = "s3cr3t"\n',
        '[security]\napi_key = ["s3cr3t"]\n',
        '[[security.api_key]]\nname = ""\nkey = "s3cr3t"\nmore = "s3cr3t"\n',
        '[security]\nkey = "s3cr3t"\n',
    ],
)
def test_no_message_shows_a_secret(tmp_path: Path, text: str) -> None:
    file = tmp_path / "node.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert "security" in caught.value.message
    chain: list[BaseException | None] = [caught.value, caught.value.__cause__, caught.value.__context__]
    assert all("s3cr3t" not in str(error) for error in chain)
    assert "s3cr3t" not in str(caught.value.details)


# --- what is shipped ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(NODE_CONFIGS.glob("*.toml")), ids=lambda file: file.stem)
def test_every_shipped_configuration_loads_and_is_safe(file: Path) -> None:
    config = load_config(file)
    assert file.read_text().startswith("# ")
    assert config.demo_models or config.deploy


def test_the_shipped_configurations_are_those_that_the_issue_names() -> None:
    names = {file.stem for file in NODE_CONFIGS.glob("*.toml")}
    assert names >= {"demo", "pc1-rtx3060", "pc2-gtx1660s", "wsl2-rtx4090", "cpu-only"}


def test_the_commented_lines_of_the_shipped_configurations_are_right_too(tmp_path: Path) -> None:
    """What a newcomer uncomments must load: every `# key = value` and `# [table]` line, one file at a time."""
    for file in NODE_CONFIGS.glob("*.toml"):
        lines = []
        for line in file.read_text().splitlines():
            bare = line.removeprefix("# ")
            looks_like_toml = bare.startswith("[") or (
                bare.partition(" = ")[0].replace("_", "").isalnum() and " = " in bare
            )
            lines.append(bare if line.startswith("# ") and looks_like_toml else line)
        text = "\n".join(lines).replace('key = "..."', f'key = "{KEY}"')
        # A key that stands twice is an alternative; the commented one is tried in its place.
        seen: dict[str, int] = {}
        kept: list[str] = []
        for line in text.splitlines():
            if line.startswith("["):
                seen = {}
            key = line.partition(" = ")[0]
            if " = " in line and not line.startswith("#"):
                if key in seen:
                    kept[seen[key]] = line
                    continue
                seen[key] = len(kept)
            kept.append(line)
        changed = tmp_path / file.name
        changed.write_text("\n".join(kept))
        assert load_config(changed) != load_config(file) or "\n".join(kept) == file.read_text().rstrip("\n")


def test_adapters_and_the_draft_lie_beside_the_file_and_their_mistakes_have_lines(tmp_path: Path) -> None:
    text = """
[engines]
continuation = "exact"

[[model]]
name = "m"
path = "m.gguf"
draft = "small.gguf"
[[model.adapters]]
name = "legal"
path = "legal.gguf"
[[model.adapters]]
name = "polite"
path = "/elsewhere/polite.gguf"
"""
    config = load(tmp_path, text)
    (model,) = config.model
    assert config.engines.exact
    assert model.draft == tmp_path / "small.gguf"
    assert [each.path for each in model.adapters] == [tmp_path / "legal.gguf", Path("/elsewhere/polite.gguf")]
    shown = str(config.redacted())
    assert str(tmp_path) not in shown
    assert "/elsewhere" not in shown
    said = refusal(tmp_path, text.replace('name = "polite"', 'nam = "polite"'))
    assert "line 13" in said
    assert "Did you mean name?" in said
    assert "adapters" in refusal(tmp_path, '[[model]]\nname = "m"\npath = "m.gguf"\nadapters = ["legal.gguf"]')
