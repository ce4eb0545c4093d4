"""Configuration: what is read, and one line for everything that cannot be used."""

import dataclasses
import pathlib

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from running import ROOT

from fixmatch.config import KEYS, Config, ConfigError, from_dict, load_config, recipes, to_dict, to_yaml
from fixmatch.config_docs import commented_yaml
from fixmatch.settings import sections


@pytest.fixture
def write(tmp_path):
    def to(text: str, name: str = "c.yaml") -> pathlib.Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name
    return to


def error_of(path, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_loads(path):
    config = load_config(path)
    assert config.run.name == path.stem
    assert config.run.dir == f"runs/{path.stem}"


def test_an_empty_file_gives_the_recipe_of_the_paper(write):
    config = load_config(write(""))
    assert (config.train.total_steps, config.train.batch_size, config.train.mu) == (2**20, 64, 7)
    assert (config.ssl.threshold, config.ssl.temperature, config.ssl.lambda_u) == (0.95, 1.0, 1.0)
    assert (config.optim.lr, config.optim.momentum, config.optim.weight_decay) == (0.03, 0.9, 5e-4)
    assert (config.ema.decay, config.model.bn_momentum, config.data.include_labeled) == (0.999, 0.999, True)


@pytest.mark.parametrize(("line", "key", "value", "meant"), [
    ("ssl: {treshold: 0.9}", "ssl.treshold", "", "ssl.threshold"),
    ("optim: {batch_size: 8}", "optim.batch_size", "", "train.batch_size"),
    ("trian: {mu: 3}", "trian", "", "train"),
    ("data: {name: cifar}", "data.name", "'cifar'", "cifar10"),
    ("ssl: {mode: fixmach}", "ssl.mode", "'fixmach'", "fixmatch"),
    ("train: {lr: 0.1}", "train.lr", "", "optim.lr"),
    ("lr: 0.1", "lr", "", "optim.lr"),
])
def test_a_misspelt_key_or_name_is_said_with_what_was_meant(write, line, key, value, meant):
    path = write(line)
    message = error_of(path)
    assert message.startswith(f"{path}: {key}: ")
    assert value in message
    assert f"did you mean {meant}" in message


@pytest.mark.parametrize(("override", "key"), [
    ("epochs=30", "train.total_steps: steps of the run)"), ("optim.learning_rate=0.1", "optim.lr: "),
    ("train.learning-rate=0.1", "optim.lr: "), ("p_cutoff=0.9", "ssl.threshold: "), ("ssl.uratio=7", "train.mu: "),
])
def test_another_programs_name_for_a_key_is_translated(write, override, key):
    assert f"unknown key (here it is {key}" in error_of(write(""), override)


def test_no_key_is_called_elsewhere_what_another_key_is_called_here():
    other_names = [name for entry in KEYS.values() for name in entry.metadata["also"]]
    assert len(other_names) == len(set(other_names))
    assert not set(other_names) & {name.split(".")[1] for name in KEYS}


@pytest.mark.parametrize(("line", "key", "value"), [
    ("train: {mu: seven}", "train.mu", "'seven'"),
    ("train: {mu: 1.5}", "train.mu", "1.5"),
    ("train: {mu: true}", "train.mu", "True"),
    ("train: {mu: [7]}", "train.mu", "[7]"),
    ("train: {mu: null}", "train.mu", "None"),
    ("train: {mu: 0}", "train.mu", "0"),
    ("train: {amp: 1}", "train.amp", "1"),
    ("train: {amp: 'yes'}", "train.amp", "'yes'"),
    ("train: {amp: true}", "train.amp", "one of off, float16, bfloat16, got 'true'"),
    ("run: {name: [a]}", "run.name", "['a']"),
    ("run: {name: true}", "run.name", "True"),
    ("run: {seed: -1}", "run.seed", "-1"),
    ("run: {seed: 18446744073709551616}", "run.seed", "18446744073709551616"),
    ("run: {dir: \"a\\0b\"}", "run.dir", "'a\\x00b'"),
    ("optim: {lr: 0}", "optim.lr", "0"),
    ("optim: {lr: .nan}", "optim.lr", "nan"),
    ("optim: {lr: .inf}", "optim.lr", "inf"),
    ("optim: {lr: nan}", "optim.lr", "nan"),
    ("optim: {lr: 2026-01-01}", "optim.lr", "2026"),
    ("ssl: {threshold: 1.01}", "ssl.threshold", "1.01"),
    ("ema: {decay: -0.1}", "ema.decay", "-0.1"),
    ("train: 5", "train", "5"),
    ("model: {depth: 12}", "model.depth", "12"),
    ("model: {arch: resnext, depth: 10}", "model.depth", "10"),
    ("optim: {warmup_steps: 10}\ntrain: {total_steps: 10}", "optim.warmup_steps", "10"),
    ("optim: {momentum: 0}", "optim.momentum", "0"),
])
def test_a_wrong_value_is_said_with_file_key_and_value(write, line, key, value):
    path = write(line)
    message = error_of(path)
    assert message.startswith(f"{path}: {key}: ")
    assert value in message


@pytest.mark.parametrize("text", [
    "train: {mu: 7",
    "train:\n  mu: 7\n mu: 8\n",
    "- a\n- b",
    "just text",
    "train: !!python/object/apply:os.system ['true']",
    "run: {seed: 2026-13-45}",
    "run: {seed: " + "1" * 5000 + "}",
    "[" * 5000,
    "train: {mu: 7}\ntrain: {batch_size: 8}",
    "train: {mu: 7, mu: 8}",
    "\x01",
], ids=lambda text: text[:24])
def test_a_file_that_is_no_settings_is_refused_by_name(write, text):
    path = write(text)
    assert error_of(path).startswith(f"{path}:")


def test_a_yaml_error_names_its_line(write):
    assert "line 3" in error_of(write("train:\n  mu: 7\n bad: [\n"))


def test_files_that_cannot_be_read(tmp_path, write):
    write("", "digits.yaml")
    assert "did you mean" in error_of(tmp_path / "digit.yaml")
    assert str(tmp_path) in error_of(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: \xff\xfe}")
    assert "latin.yaml" in error_of(tmp_path / "latin.yaml")


def test_a_base_is_read_first_and_its_errors_name_it(write):
    base = write("train: {mu: 3, batch_size: 8}", "base.yaml")
    path = write("base: base.yaml\ntrain: {mu: 5}")
    assert dataclasses.astuple(load_config(path).train)[1:3] == (8, 5)
    base.write_text("train: {mu: x}")
    assert error_of(write("base: base.yaml")).startswith(f"{base}: train.mu: ")


def test_a_base_that_is_missing_cyclic_or_no_name(write):
    assert "nowhere.yaml" in error_of(write("base: nowhere.yaml"))
    assert "base" in error_of(write("base: [a]"))
    assert "base" in error_of(write('base: "a\\0b"'))
    write("base: c.yaml", "d.yaml")
    assert "include each other" in error_of(write("base: d.yaml"))


@pytest.mark.parametrize(("override", "section", "name", "value"), [
    ("optim.lr=3e-2", "optim", "lr", 0.03),
    ("train.total_steps=1e3", "train", "total_steps", 1000),
    ("train.total_steps=1_000", "train", "total_steps", 1000),
    ("optim.lr=1", "optim", "lr", 1.0),
    ("data.split_seed=3", "data", "split_seed", 3),
    ("data.split_seed=null", "data", "split_seed", None),
    ("train.amp=off", "train", "amp", "off"),
    ("train.amp=false", "train", "amp", "off"),  # as it was written when it was true or false
    ("train.amp=bfloat16", "train", "amp", "bfloat16"),
    ("run.name=007", "run", "name", "7"),
    ("run.name='007'", "run", "name", "007"),
    ("run.name=a=b", "run", "name", "a=b"),
    ("run.dir='a b'", "run", "dir", "a b"),
    (" ssl.mode = none", "ssl", "mode", "none"),
    ("runtime.cpu_kernels=on", "runtime", "cpu_kernels", "on"),
    ("runtime.cpu_kernels=off", "runtime", "cpu_kernels", "off"),
    ("augment.flip=false", "augment", "flip", False),
    ("augment.flip=null", "augment", "flip", None),
])
def test_an_override_is_read_as_yaml(write, override, section, name, value):
    found = getattr(getattr(load_config(write("data: {split_seed: 9}"), [override]), section), name)
    assert found == value
    assert type(found) is type(value)


def test_later_overrides_win(write):
    assert load_config(write("train: {mu: 2}"), ["train.mu=3", "train.mu=4"]).train.mu == 4


@pytest.mark.parametrize("override", [
    "train.mu", "=5", "train=5", "train.mu=", "train.mu=[", "train.mu=__import__('os')", "train.mu.x=5",
    "train.mu=7\n8", "run.seed=2026-13-45", "train.mu=" + "[" * 5000,
    "optim.lr=!!map [1]", "optim.lr=!!int ''", "optim.lr=!!bool x", "optim.lr=!!timestamp x",
], ids=lambda text: text[:24])
def test_an_override_that_cannot_be_used_is_one_line(write, override):
    assert "-o" in error_of(write(""), override)


def test_an_override_error_says_so_and_not_the_file(write):
    assert error_of(write("train: {mu: 7}"), "train.mu=x").startswith("-o: train.mu: ")


def test_an_unknown_key_in_an_override_is_suggested(write):
    assert "did you mean ssl.threshold" in error_of(write(""), "ssl.treshold=1")


def _values(kind, metadata):
    low, high, above = (metadata.get(name) for name in ("low", "high", "above"))
    if metadata.get("choices"):
        return st.sampled_from(metadata["choices"])
    if kind is bool:
        return st.booleans()
    if kind == bool | None:
        return st.none() | st.booleans()
    if kind is str:  # without ~, which would be expanded in a path
        return st.text(st.characters(codec="utf-8", exclude_characters="\0~"), max_size=20)
    if kind is float:
        return st.floats(low if low is not None else above, high if high is not None else 1e6,
                         exclude_min=above is not None, allow_nan=False)
    if kind == tuple[int, ...]:
        return st.lists(st.integers(1, 500), max_size=12).map(tuple)
    if kind == tuple[float, ...] | None:
        return st.none() | st.tuples(*[st.floats(0.001, 1.0)] * 3)
    numbers = st.integers(low, high if high is not None else 10**6)
    return numbers if kind is int else st.none() | numbers


@st.composite
def configs(draw) -> Config:
    tree = {}
    for section, cls in sections(Config).items():
        tree[section] = {f.name: draw(_values(f.type, f.metadata)) for f in dataclasses.fields(cls)}
    for name, entry in KEYS.items():  # what does nothing elsewhere keeps its default there
        if entry.metadata["only"] is not None:
            (other, key), values = entry.metadata["only"][0].split("."), entry.metadata["only"][1]
            if tree[other][key] not in values:
                tree[name.split(".")[0]][entry.name] = entry.default
    tree["model"]["depth"] = 6 * draw(st.integers(2, 20)) + 4
    tree["train"]["total_steps"] += tree["optim"]["warmup_steps"]
    tree["optim"]["nesterov"] &= tree["optim"]["momentum"] > 0
    return Config(**{section: sections(Config)[section](**values) for section, values in tree.items()})


@settings(max_examples=100, deadline=None, derandomize=True)
@given(configs())
def test_a_config_survives_dict_and_yaml(config):
    assert from_dict(to_dict(config), "here") == config
    assert from_dict(yaml.safe_load(to_yaml(config)), "here") == config
    assert from_dict(yaml.safe_load(commented_yaml(config)), "here") == config


def test_a_home_folder_is_meant_wherever_a_path_is_said(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    loaded = load_config(write("run: {dir: ~/runs/a}\ndata: {root: '~'}"))
    given = from_dict({"run": {"dir": "~/runs/a"}}, "here", ["data.root=~/data"])
    assert (loaded.run.dir, loaded.data.root) == ("/home/me/runs/a", "/home/me")
    assert (given.run.dir, given.data.root) == ("/home/me/runs/a", "/home/me/data")


def test_the_printed_config_loads_to_the_same(write):
    config = load_config(write("run: {name: '1e5'}\noptim: {lr: 1e-3}\ndata: {split_seed: null}\n"
                               "runtime: {cpu_kernels: off}"))
    assert config.runtime.cpu_kernels == "off"
    assert load_config(write(to_yaml(config), "again.yaml")) == config


@pytest.mark.parametrize(("lines", "key", "where"), [
    ("data: {name: cifar10, image_size: 32}", "data.image_size", "folder or csv"),
    ("data: {name: digits, max_broken: 3}", "data.max_broken", "folder or csv"),
    ("data: {name: stl10, extra: true}", "data.extra", "svhn"),
    ("data: {name: svhn, fold: 0}", "data.fold", "stl10"),
    ("model: {arch: wideresnet, cardinality: 8}", "model.cardinality", "resnext"),
])
def test_a_setting_that_does_nothing_is_an_error_that_says_so(write, lines, key, where):
    path = write(lines)
    message = error_of(path)
    assert message.startswith(f"{path}: {key}: does nothing with ")
    assert where in message


def test_every_key_that_acts_only_somewhere_says_where_by_keys_and_values_that_are_there():
    for entry in KEYS.values():
        if entry.metadata["only"] is not None:
            other, values = entry.metadata["only"]
            assert set(values) <= set(KEYS[other].metadata["choices"])


def test_every_key_has_a_meaning():
    assert all(len(entry.metadata["meaning"]) > 5 for entry in KEYS.values())


def test_a_packaged_recipe_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipes().keys() == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert load_config("digits") == load_config(ROOT / "configs/digits.yaml")
    assert "no such configuration file" in error_of("digit")


def test_a_few_anchors_do_not_make_a_long_message(write):
    assert len(error_of(write("train:\n  mu:\n  - &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"  - &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))))) < 300


def test_images_are_counted_with_both_views_and_without_the_supervised_start():
    def images(first, last, **ssl):
        return from_dict({"train": {"batch_size": 4, "mu": 3}, "ssl": ssl}, "test").images(first, last)
    assert images(0, 10) == 10 * (4 + 2 * 12)
    assert images(0, 10, mode="none", supervised_steps=3) == 10 * 4
    assert images(0, 10, supervised_steps=3) == 3 * 4 + 7 * 28
    assert images(0, 2, supervised_steps=3) == 2 * 4
    assert images(2, 5, supervised_steps=3) == 4 + 2 * 28
    assert images(5, 9, supervised_steps=3) == 4 * 28


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.mu = 3


def test_every_key_has_a_section_and_a_name():
    assert {"run.seed", "data.name", "ssl.threshold", "parity.on_failure"} <= set(KEYS)
