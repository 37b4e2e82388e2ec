"""What a node is to be, before anything is opened: its models, what nobody asked for, and the configuration in the parts' words."""

import pytest

from tars.catalogue import Catalogue
from tars.config import load_config
from tars.core.types import Deployment
from tars.errors import JoinRefused, ModelFileMissing, UnknownModel
from tars.node_preparation import (
    DEMO_MODELS,
    check_files,
    file_store,
    own_entry,
    prepare,
    rpc_options,
    worker_options,
)
from tars.state_folder import StateFolder


@pytest.fixture
def load(tmp_path):
    def loaded(text=""):
        file = tmp_path / "node.toml"
        file.write_text(text)
        return load_config(file, overrides={"node.state_dir": str(tmp_path / "state")})

    return loaded


def names(deployments):
    return tuple(each.model for each in deployments)


@pytest.mark.parametrize(
    ("text", "declared", "unasked"),
    [
        ("", DEMO_MODELS, DEMO_MODELS),
        ("[demo]\nmodels = true\n", DEMO_MODELS, ()),
        ("[demo]\nmodels = false\n", (), ()),
        ('[[deploy]]\nmodel = "tars-help-desk"\n', DEMO_MODELS[:1], ()),
        ('[demo]\nmodels = true\n[[deploy]]\nmodel = "all-minilm-l6-v2"\n', DEMO_MODELS[::-1], ()),
    ],
)
def test_the_demo_models_come_where_nothing_else_was_asked_for_and_once(load, text, declared, unasked):
    prepared = prepare(load(text), ())
    assert (names(prepared.declared), names(prepared.unasked)) == (declared, unasked)


def test_a_file_of_the_command_line_comes_instead_of_the_demo_models(load, tiny_gguf):
    prepared = prepare(load(), (tiny_gguf,))
    (wanted,) = prepared.declared
    assert prepared.catalogue.find(wanted.model) is not None
    assert wanted == Deployment(wanted.model)


def test_an_alias_is_deployed_under_its_name_and_an_unknown_model_refused(load):
    assert names(prepare(load('[[deploy]]\nmodel = "mistral-7b"\n'), ()).declared) == ("mistral-7b-instruct-v0.2",)
    with pytest.raises(UnknownModel):
        prepare(load('[[deploy]]\nmodel = "no-such-model"\n'), ())


def test_a_malformed_invitation_is_refused_before_anything_is_opened(load, tmp_path):
    with pytest.raises(JoinRefused):
        prepare(load(), (), "no invitation")
    assert not (tmp_path / "state").exists()


def test_checked_are_the_files_of_what_is_configured_also_where_nobody_deploys_it(load):
    text = '[demo]\nmodels = false\n[[model]]\nname = "mine"\npath = "missing.gguf"\n'
    with pytest.raises(ModelFileMissing):
        check_files(prepare(load(text), ()))
    check_files(prepare(load("[demo]\nmodels = false\n"), ()))


def test_limits_and_keys_are_told_to_the_calls_side(load):
    key = "0123456789abcdef" * 2
    options = rpc_options(
        load(
            "[limits]\nmax_body_bytes = 70000\nmax_batch = 7\nmax_depth = 9\nmax_string_bytes = 60000\n"
            "max_concurrent_calls = 11\ndefault_timeout_ms = 5000\n"
            f'[security]\nallowed_hosts = ["box"]\nallowed_origins = ["http://page"]\n'
            f'[[security.api_key]]\nname = "one"\nkey = "{key}"\n'
        )
    )
    bounds = options.envelope
    assert (bounds.max_body_bytes, bounds.max_batch, bounds.max_depth, bounds.max_string_bytes) == (70000, 7, 9, 60000)
    assert (options.max_concurrent_calls, options.default_timeout_ms) == (11, 5000)
    assert options.access.api_keys == {"one": key}
    assert (*options.access.allowed_hosts, *options.access.allowed_origins) == ("box", "http://page")


def test_time_outs_and_the_folder_of_states_are_told_to_the_workers(load, tmp_path):
    options = worker_options(
        load("[worker]\nhang_seconds = 33\nstop_seconds = 4\nnice = 3\n[limits]\nqueue_per_replica = 5\n")
    )
    assert (options.hang_seconds, options.stop_seconds, options.nice, options.queue_limit) == (33, 4, 3, 5)
    assert options.saved_folder.parent == tmp_path / "state"


def test_fetched_files_lie_in_the_state_folder_or_where_the_configuration_says(load, tmp_path):
    for text, folder in (("", tmp_path / "state" / "models"), (f'[files]\nfolder = "{tmp_path}"\n', tmp_path)):
        config = load(text)
        assert file_store(config, Catalogue.load(), StateFolder(config.node.state_dir))._folder.path == folder


def test_only_models_that_others_do_not_have_anyway_are_told_to_them(load, tiny_gguf):
    prepared = prepare(load(), (tiny_gguf,))
    assert own_entry(prepared.catalogue, prepared.declared[0].model) is not None
    assert own_entry(prepared.catalogue, DEMO_MODELS[0]) is None
