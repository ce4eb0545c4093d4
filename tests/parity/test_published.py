"""Stage `config`: the packaged recipes are the published settings, and what a run sets otherwise is said."""

import dataclasses
import fnmatch

import pytest

from fixmatch import config as configuration
from fixmatch.config import Config, load_config
from fixmatch.data.sources import cifar
from parity import plants, published
from parity.case import Case

CASE = Case(Config(), 10)
SLIPS = {name: bug for name, bug in plants.PLANTS.items() if bug.kind == "recipes"}

# The row that names each slip: the first that diverges, and what it says.
NAMED_BY = {
    "recipe-cifar100-weight-decay": ("cifar100_2500/optim.weight_decay", "0.0005, published 0.001"),
    "recipe-cifar10-weight-decay": ("cifar10_40/optim.weight_decay", "0.001, published 0.0005"),
    "recipe-mu-4": ("cifar10_250/train.mu", "4, published 7"),
    "recipe-threshold-0.9": ("cifar10_40/ssl.threshold", "0.9, published 0.95"),
    "recipe-wrn-28-2-on-cifar100": ("cifar100_400/model.width", "2, published 8"),
    "recipe-resnext-8x64-on-cifar10": ("cifar10_40_resnext/model.depth", "29, published 28"),
    "recipe-warmup-on": ("cifar10_40/optim.warmup_steps", "1024, published 0"),
    "recipe-ema-0.99": ("cifar100_400/ema.decay", "0.99, published 0.999"),
    "recipe-ema-0.9999": ("cifar10_4000/ema.decay", "0.9999, published 0.999"),
    "recipe-labels-of-another-recipe": ("cifar10_4000/data.num_labeled", "400, published 4000"),
    "recipe-labeled-left-out": ("cifar100_10000/data.include_labeled", "false, published true"),
    "recipe-strong-google": ("cifar10_40/augment.strong", "google, published reference"),
    "recipe-bn-momentum-0.9": ("cifar10_250/model.bn_momentum", "0.9, published 0.999"),
    "recipe-nesterov-off": ("cifar100_400_resnext/optim.nesterov", "false, published true"),
    "recipe-half-the-steps": ("cifar10_40_resnext/train.total_steps", "524288, published 1048576"),
    "recipe-batch-128": ("cifar10_40/train.batch_size", "128, published 64"),
    "recipe-evaluation-every-1000": ("cifar10_4000/train.eval_every", "1000, published 1024"),
    "recipe-cifar10-in-a-cifar100-recipe": ("cifar100_400/data.name", "cifar10, published cifar100"),
    "statistics-swapped": ("cifar10_40/data.mean", "[0.5071, 0.4867, 0.4408], published [0.4914, 0.4822, 0.4465]"),
    "statistics-cifar100-as-cifar10": ("cifar100_400/data.mean",
                                       "[0.4914, 0.4822, 0.4465], published [0.5071, 0.4867, 0.4408]"),
    "flip-off-by-the-data-set": ("cifar10_40/augment.flip", "false, published true"),
}


def test_every_packaged_recipe_has_an_entry_and_every_entry_a_recipe():
    assert configuration.recipes().keys() == published.RECIPES.keys()


def test_every_recipe_is_the_published_one():
    rows = list(published.rows(CASE))
    assert [row for row in rows if not row.passed] == []
    compared = [name for name, entry in published.RECIPES.items() if isinstance(entry, tuple)]
    assert len(compared) == 15
    for name in compared:
        keys = {row.name() for row in rows if row.tensor.startswith(f"{name}/")}
        assert keys == published.published(*published.RECIPES[name]).keys()


def test_every_configuration_key_is_published_or_open():
    """A new key of the configuration has to be put into the table or among those that no publication fixes."""
    known = {key for entry in published.RECIPES.values() if isinstance(entry, tuple)
             for key in published.published(*entry)}
    unknown = [key for key in configuration.KEYS if key not in known
               and not any(fnmatch.fnmatchcase(key, pattern) for pattern in published.OPEN)]
    assert unknown == []


@pytest.mark.parametrize(("recipe", "decay", "width", "labels_a_class"), [
    ("cifar10_40", 5e-4, 2, 4), ("cifar10_250", 5e-4, 2, 25), ("cifar10_4000", 5e-4, 2, 400),
    ("cifar100_400", 1e-3, 8, 4), ("cifar100_2500", 1e-3, 8, 25), ("cifar100_10000", 1e-3, 8, 100)])
def test_the_table_by_hand(recipe, decay, width, labels_a_class):
    entry = published.RECIPES[recipe]
    wanted = {key: value for key, (value, _) in published.published(*entry).items()}
    assert wanted["optim.weight_decay"] == decay
    assert (wanted["model.depth"], wanted["model.width"]) == (28, width)
    assert wanted["data.num_labeled"] == labels_a_class * wanted["classes"]
    assert wanted["train.total_steps"] == 2**20 == 1024 * wanted["train.eval_every"]
    assert wanted["train.batch_size"] * (1 + 2 * wanted["train.mu"]) == 960  # images a step


def test_what_a_run_sets_otherwise_is_said():
    def said(recipe, *overrides):
        return published.deviations(load_config(configuration.recipes()[recipe], overrides))

    assert said("cifar10_40") == said("cifar100_10000_resnext") == []
    assert said("cifar10_40", "optim.lr=0.1") == ["optim.lr 0.1, published 0.03"]
    assert said("cifar100_400", "data.num_labeled=500", "data.mean=[0.5,0.5,0.5]") == [
        "data.num_labeled 500, published 400, 2500, 10000",
        "data.mean [0.5, 0.5, 0.5], published [0.5071, 0.4867, 0.4408]"]
    assert said("cifar10_40", "augment.flip=false", "ssl.mode=none") == [
        "augment.flip false, published true", "ssl.mode none, published fixmatch"]
    assert "train.total_steps 5500, published 1048576" in said("cifar10_4000_cpu")
    assert said("digits") == ["data.name digits, published settings are of cifar10 and cifar100"]


def test_a_recipe_without_entry_without_file_or_unreadable_fails(tmp_path, monkeypatch):
    files = {**configuration.recipes(), "mine": tmp_path / "mine.yaml", "folder": tmp_path / "folder.yaml"}
    files["folder"].write_text("data:\n  nmae: folder\n")
    del files["cifar10_40"]
    monkeypatch.setattr(configuration, "recipes", lambda: files)
    failed = {row.tensor: row.why for row in published.rows(CASE) if not row.passed}
    assert failed.keys() == {"mine/entry", "cifar10_40/file", "folder/loads"}
    assert "data.nmae: unknown key" in failed["folder/loads"]


def test_constants_come_from_the_reader_of_the_data_set(monkeypatch):
    """Not from a constant beside it: what `load_cifar` returns is what a run normalizes by."""
    right = cifar.load_cifar
    monkeypatch.setattr(cifar, "load_cifar", lambda *args: dataclasses.replace(right(*args), std=(0.2, 0.2, 0.2)))
    failed = {row.name() for row in published.rows(CASE) if not row.passed}
    assert failed == {"data.std"}


def test_every_slip_says_which_row_names_it():
    assert NAMED_BY.keys() == SLIPS.keys()
    assert len(SLIPS) >= 10


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_in_a_recipe_is_caught(name, monkeypatch):
    with plants.planted(name):
        row = next(row for row in published.rows(CASE) if not row.passed)
    tensor, why = NAMED_BY[name]
    assert row.tensor == tensor
    assert row.why.startswith(why)
    assert all(row.passed for row in published.rows(CASE)), "the plant was not taken out again"
