"""Checkpoints of the reference, to us and back."""

import dataclasses
import os
import shutil
import subprocess
import sys

import cifar_archive
import numpy as np
import pytest
from running import ROOT, first_of

torch = pytest.importorskip("torch")

from fixmatch import checkpoint, cli, run  # noqa: E402
from fixmatch.config import Config, ModelConfig, load_config, recipes, to_dict  # noqa: E402
from fixmatch.data import NUM_CLASSES  # noqa: E402
from parity import convert, convert_stage, plants, reference_checkpoint  # noqa: E402
from parity.case import IDLE, small_case  # noqa: E402
from parity.mirror.models import build_model  # noqa: E402
from parity.plants.convert import PLANTS  # noqa: E402
from parity.small_run import short_config, small_source, training_on  # noqa: E402

SHAPES = {"wideresnet": {"depth": 16, "width": 2}, "resnext": {"depth": 20, "width": 4, "cardinality": 4}}


NETWORK = ModelConfig("wideresnet", 10, 1)


def manifest(classes, step: int = 0) -> checkpoint.Manifest:
    return checkpoint.Manifest(step, to_dict(Config(model=NETWORK)), "folder", tuple(classes), (0.1, 0.2, 0.3),
                               (0.4, 0.5, 0.6))


def trained_by_the_reference(path, steps: int = 2, num_classes: int = 10):
    """A file as the reference's train.py saves it, its groups made by that file's own lines; (network, optimizer)."""
    torch.manual_seed(0)
    network = build_model("wideresnet", num_classes, depth=10, width=1)
    no_decay = ["bias", "bn"]
    optimizer = torch.optim.SGD([
        {"params": [p for n, p in network.named_parameters() if not any(nd in n for nd in no_decay)],
         "weight_decay": 1e-3},
        {"params": [p for n, p in network.named_parameters() if any(nd in n for nd in no_decay)],
         "weight_decay": 0.0}], lr=0.05, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100)
    for _ in range(steps):
        optimizer.zero_grad()
        network(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        schedule.step()
    torch.save({"epoch": 3, "state_dict": network.state_dict(), "ema_state_dict": None, "acc": 1.0, "best_acc": 2.0,
                "optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict()}, path)
    return network, optimizer


def reference_file(path, arch: str, prefix: str = "", num_classes: int = 10) -> dict:
    torch.manual_seed(0)
    raw, average = (build_model(arch, num_classes, **SHAPES[arch]).state_dict() for _ in range(2))
    named = {key: {prefix + n: t for n, t in s.items()} for key, s in
             (("state_dict", raw), ("ema_state_dict", average))}
    torch.save({"epoch": 7, "acc": 12.5, "best_acc": np.float64(93.5), **named}, path)
    return {"state_dict": raw, "ema_state_dict": average}


@pytest.mark.parametrize("arch", SHAPES)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_there_and_back_is_the_same(arch, prefix, tmp_path, capsys):
    states = reference_file(tmp_path / "model_best.pth.tar", arch, prefix)
    assert cli.main(["convert", str(tmp_path / "model_best.pth.tar"), str(tmp_path / "ours")]) == 0
    assert "logits agree" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "ours").manifest.config["model"]["arch"] == arch
    assert cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "back.pth.tar")]) == 0
    back = torch.load(tmp_path / "back.pth.tar", weights_only=True)
    for key, state in states.items():
        assert back[key].keys() == state.keys()
        assert all(torch.equal(back[key][n], t) for n, t in state.items() if not n.endswith("num_batches_tracked"))


def test_a_bare_state_dict(tmp_path):
    torch.save(build_model("wideresnet", 100, depth=10, width=1).state_dict(), tmp_path / "bare.pth")
    assert cli.main(["convert", str(tmp_path / "bare.pth"), str(tmp_path / "ours")]) == 0
    assert checkpoint.load(tmp_path / "ours").manifest.dataset == "cifar100"


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_what_was_converted_can_be_evaluated(name, tmp_path, capsys):
    torch.save(build_model("wideresnet", NUM_CLASSES[name], depth=10, width=1).state_dict(), tmp_path / "bare.pth")
    assert cli.main(["convert", str(tmp_path / "bare.pth"), str(tmp_path / "ours")]) == 0
    files = cifar_archive.contents(name)
    meta, key = ("batches.meta", b"label_names") if name == "cifar10" else ("meta", b"fine_label_names")
    files[meta][key] = [word.encode() for word in convert._CLASSES[name].split()]
    cifar_archive.write_folder(tmp_path / "data", files, name)
    capsys.readouterr()
    code = cli.main(["eval", str(tmp_path / "ours"), "-o", f"data.root={tmp_path / 'data'}"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "raw" in out


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile_was_here",)


@pytest.mark.parametrize("content", [
    {"state_dict": Hostile()}, {"state_dict": {"a.weight": torch.zeros(2)}}, [1, 2], {"state_dict": 3},
    {"state_dict": {"bn1.weight": torch.zeros(2, dtype=torch.bfloat16)}}, {"state_dict": {1: torch.zeros(2)}},
    {"state_dict": {**build_model("wideresnet", 10, depth=10, width=1).state_dict(), "extra.weight": torch.zeros(3)}},
    {"state_dict": {n: t for n, t in build_model("wideresnet", 10, depth=10, width=1).state_dict().items()
                    if n != "bn1.running_var"}},
])
def test_what_is_no_reference_checkpoint_is_refused(content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "bad.pth")
    assert cli.main(["convert", "bad.pth", "ours"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert sorted(os.listdir()) == ["bad.pth"]


def test_a_checkpoint_with_a_foreign_name_is_refused(tmp_path, capsys):
    checkpoint.save(tmp_path / "ours", {"model/fc.wieght": np.zeros((2, 2)), "ema/fc.weight": np.zeros((2, 2))},
                    manifest(["a", "b"]))
    assert cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "back.pth.tar")]) == 2
    assert "fc.wieght" in capsys.readouterr().err
    assert not (tmp_path / "back.pth.tar").exists()


def test_garbage_and_absence_are_one_line(tmp_path, capsys):
    (tmp_path / "garbage.pth").write_bytes(b"not a checkpoint")
    for name in ("garbage.pth", "absent.pth"):
        assert cli.main(["convert", str(tmp_path / name), str(tmp_path / "ours")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None  # importing it then fails as if it was not there
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_without_torch_the_command_says_what_it_needs(tmp_path):
    (tmp_path / "hide.py").write_text(WITHOUT_TORCH)
    command = [sys.executable, tmp_path / "hide.py", ROOT / "tools/convert.py", tmp_path / "a.pth.tar", tmp_path / "b"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "needs torch: pip install" in done.stderr


def test_the_references_momentum_comes_under_the_right_names(tmp_path, capsys):
    network, optimizer = trained_by_the_reference(tmp_path / "a.pth.tar")
    assert cli.main(["convert", str(tmp_path / "a.pth.tar"), str(tmp_path / "ours")]) == 0
    assert "momentum of 21 parameters" in capsys.readouterr().out
    found = checkpoint.load(tmp_path / "ours")
    expected = {n: optimizer.state[p]["momentum_buffer"].numpy() for n, p in network.named_parameters()
                if p in optimizer.state}
    assert found.part("momentum").keys() == expected.keys() == {n for n, _ in network.named_parameters()} - {*IDLE}
    for name, array in found.part("momentum").items():
        np.testing.assert_array_equal(array, expected[name].T if expected[name].ndim == 2 else expected[name])
    assert found.manifest.step == 2
    assert found.manifest.provenance["epoch"] == 3
    optim = found.manifest.config["optim"]
    assert (optim["lr"], optim["momentum"], optim["nesterov"], optim["weight_decay"]) == (0.05, 0.9, True, 1e-3)


def test_without_a_schedule_the_epochs_count_the_steps(tmp_path):
    reference_file(tmp_path / "a.pth.tar", "wideresnet")
    assert cli.main(["convert", str(tmp_path / "a.pth.tar"), str(tmp_path / "ours")]) == 0
    assert checkpoint.load(tmp_path / "ours").manifest.step == 7 * 1024


def test_an_optimizer_of_another_kind_is_left_out_and_said_to_be(tmp_path, capsys):
    network = build_model("wideresnet", 10, depth=10, width=1)
    for optimizer, why in ((torch.optim.SGD(network.parameters(), 0.1), "a decayed and an undecayed group"),
                           ("none", "not the state of a Torch SGD")):
        state = optimizer if isinstance(optimizer, str) else optimizer.state_dict()
        torch.save({"state_dict": network.state_dict(), "optimizer": state}, tmp_path / "a.pth")
        assert cli.main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "ours")]) == 0
        out = capsys.readouterr().out
        assert "without momentum" in out
        assert why in out
        assert not checkpoint.load(tmp_path / "ours").part("momentum")


def test_momentum_of_another_shape_is_left_out_and_said_to_be(tmp_path, capsys):
    trained_by_the_reference(tmp_path / "a.pth")
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    state = content["optimizer"]["state"]
    state[0], state[1] = state[1], state[0]
    torch.save(content, tmp_path / "a.pth")
    assert cli.main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "ours")]) == 0
    assert "without momentum" in (out := capsys.readouterr().out)
    assert "conv1.weight has shape" in out


def test_a_file_in_half_precision_becomes_a_checkpoint_in_single(tmp_path):
    state = build_model("wideresnet", 10, depth=10, width=1).half().state_dict()
    torch.save(state, tmp_path / "half.pth")
    assert cli.main(["convert", str(tmp_path / "half.pth"), str(tmp_path / "ours")]) == 0
    arrays = checkpoint.load(tmp_path / "ours").arrays
    assert {a.dtype for a in arrays.values()} == {np.dtype("float32")}
    np.testing.assert_array_equal(arrays["model/conv1.weight"], state["conv1.weight"].float().numpy())


def test_weights_that_are_no_numbers_are_refused(tmp_path, capsys):
    """In the raw weights or in the average alone: the error of one must not hide behind the other's."""
    for key in ("state_dict", "ema_state_dict"):
        content = {k: build_model("wideresnet", 10, depth=10, width=1).state_dict()
                   for k in ("state_dict", "ema_state_dict")}
        content[key]["fc.bias"][0] = torch.nan
        torch.save(content, tmp_path / "a.pth")
        assert cli.main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "ours")]) == 2
        assert "nan" in capsys.readouterr().err
        assert not (tmp_path / "ours").exists()


def ours(folder, classes, step: int = 0):
    """A checkpoint of a fresh network with these classes."""
    state = {n: t.numpy() for n, t in build_model("wideresnet", len(classes), depth=10, width=1).state_dict().items()}
    arrays = convert.torch_to_paddle(state)
    checkpoint.save(folder, {f"{part}/{n}": a for part in ("model", "ema") for n, a in arrays.items()},
                    manifest(classes, step))


def test_class_names_and_step_of_other_data_come_back(tmp_path):
    ours(tmp_path / "run", ["wolf", "ant", "Zebra"], step=2050)
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "a.pt")]) == 0
    assert torch.load(tmp_path / "a.pt", weights_only=True)["epoch"] == 2
    assert cli.main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "back")]) == 0
    assert checkpoint.load(tmp_path / "back").manifest == checkpoint.load(tmp_path / "run").manifest


@pytest.mark.parametrize("facts", [3, {}, {"manifest": {"step": "two"}, "arrays": {}}, {"manifest": 3}, "classes"])
def test_damaged_facts_of_ours_are_refused(facts, tmp_path, capsys):
    ours(tmp_path / "run", ["a", "b"])
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "a.pth")]) == 0
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    own = content[reference_checkpoint.OWN]
    content[reference_checkpoint.OWN] = (
        own | {"manifest": own["manifest"] | {"classes": ["a"]}} if facts == "classes" else facts)
    torch.save(content, tmp_path / "a.pth")
    assert cli.main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "back")]) == 2
    assert len((err := capsys.readouterr().err).splitlines()) == 1
    assert reference_checkpoint.OWN in err


@pytest.mark.parametrize("name", ["mine.onnx", "mine", "mine.pth.zip", "mine.pdparams"])
def test_a_torch_file_is_not_given_a_foreign_name(name, tmp_path, capsys):
    ours(tmp_path / "run", ["a", "b"])
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert name in err
    assert ".pth" in err
    assert not (tmp_path / name).exists()


def test_the_order_of_parameters_is_the_references_own():
    """Its own code wrote these figures; the optimizer's state knows parameters by their order alone."""
    for name, model in (("wideresnet-16-2", ModelConfig("wideresnet", 16, 2)),
                        ("resnext-20-4x4d", ModelConfig("resnext", 20, 4, 4))):
        with np.load(ROOT / f"parity/goldens/reference/{name}.npz") as figures:
            recorded = [n.split("|")[0].removeprefix("step0/state/") for n in figures.files if "step0/state/" in n]
        network = reference_checkpoint.network_of(model, 10)
        assert recorded == [n for n in network.state_dict() if not n.endswith("num_batches_tracked")]


@pytest.mark.parametrize("recipe", recipes())
def test_the_network_of_every_recipe_is_recognized(recipe):
    """By names and shapes alone, at its own width."""
    model = load_config(recipe).model
    tensors = reference_checkpoint.network_of(model, 100).state_dict()
    state = {name: np.broadcast_to(np.float32(0), tuple(t.shape)) for name, t in tensors.items()}
    found, num_classes = convert.infer_model(state, "a file")
    assert num_classes == 100
    resnext = model.arch == "resnext"
    relevant = ("arch", "width", *(["cardinality"] if resnext else ["depth"]))
    assert {n: getattr(found, n) for n in relevant} == {n: getattr(model, n) for n in relevant}
    if resnext:  # several depths make the same network
        assert (found.depth - 2) // 9 == (model.depth - 2) // 9


def test_a_run_goes_on_from_a_converted_checkpoint(tmp_path):
    """To the reference, back, and --resume: the run ends bit for bit as without."""
    case = small_case("wideresnet", 0)
    source, config = small_source(case), short_config(case, tmp_path / "run", steps=2)
    with training_on(source):
        run.train(config)
    shutil.copytree(tmp_path / "run", tmp_path / "converted")
    convert.to_reference(tmp_path / "run", tmp_path / "a.pth.tar")
    shutil.rmtree(tmp_path / "converted/checkpoints/latest")
    convert.from_reference(tmp_path / "a.pth.tar", tmp_path / "converted/checkpoints/latest")
    ends = []
    for name in ("run", "converted"):
        with training_on(source):
            run.train(dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / name)),
                                          train=dataclasses.replace(config.train, total_steps=4)), resume=True)
        ends.append(checkpoint.load(tmp_path / name / "checkpoints/latest"))
    assert ends[0].manifest.step == ends[1].manifest.step == 4
    assert ends[0].manifest.history == ends[1].manifest.history
    assert ends[0].arrays.keys() == ends[1].arrays.keys()
    for name, array in ends[0].arrays.items():
        np.testing.assert_array_equal(array, ends[1].arrays[name])


# The first row that fails under each plant.
CAUGHT_BY = {
    "convert-square-transposed": "to the reference/converts",
    "convert-momentum-transposed": "file optimizer/fc.weight",
    "convert-mean-variance-exchanged": "to the reference/converts",
    "convert-without-batches-tracked": "file state_dict/block1.layer.0.bn1.num_batches_tracked",
    "convert-statistics-of-the-other": "file state_dict/block1.layer.0.bn1.running_mean",
    "convert-average-from-raw": "file ema_state_dict/conv1.weight",
    "convert-average-dropped": "file ema_state_dict/conv1.weight",
    "convert-float16": "file state_dict/conv1.weight",
    "convert-epoch-lost": "file/epoch is right",
    "convert-schedule-lost": "to the reference further step/next lr",
    "convert-lr-lost": "to the reference further step/lr",
    "convert-decay-in-both-groups": "to the reference further step momentum/block1.layer.0.bn1.weight",
    "convert-second-group-shifted": "file optimizer/block1.layer.0.bn1.weight",
    "convert-momentum-by-network-order": "file optimizer/block1.layer.0.conv1.weight",
    "convert-momentum-not-read": "back momentum/",
    "convert-hyperparameters-not-read": "from the reference further step/lr",
    "convert-average-not-read": "back ema/",
    "convert-prefix-kept": "from the reference/converts",
    "convert-classes-sorted": "back manifest/classes",
    "convert-step-lost": "from the reference manifest/step",
    "convert-std-of-imagenet": "from the reference manifest/std",
}


@pytest.mark.parametrize("arch", first_of(SHAPES, 1))
def test_the_stage_passes_on_clean_code(arch):
    rows = list(convert_stage.rows(small_case(arch, 0)))
    assert not [row.tensor for row in rows if not row.passed]
    for what in ("logits", "further step"):
        worst = max(row.relative for row in rows if what in row.tensor)
        assert worst < 1e-13, (what, worst)


@pytest.mark.parametrize("changed", [
    {"augment": {"strong": "ctaugment"}},  # whose rates the reference does not know
    {"optim": {"momentum": 0.0, "nesterov": False}},  # with which Torch keeps no buffers
    {"train": {"clip_grad_norm": 1.0}, "optim": {"warmup_steps": 5}},
    {"ssl": {"mode": "none"}},
])
def test_the_stage_passes_under_other_settings(changed):
    case = small_case("wideresnet", 0)
    sections = {name: dataclasses.replace(getattr(case.config, name), **values) for name, values in changed.items()}
    rows = list(convert_stage.rows(dataclasses.replace(case, config=dataclasses.replace(case.config, **sections))))
    assert not [row.tensor for row in rows if not row.passed]
    if "augment" in changed:
        assert any(row.tensor.startswith("back augment/") for row in rows)


def test_every_plant_has_a_row_here():
    assert {plant.name for plant in PLANTS} == CAUGHT_BY.keys()
    assert {plant.stage for plant in PLANTS} == {"convert"}


@pytest.mark.parametrize("name", CAUGHT_BY)
def test_a_plant_is_caught(name):
    with plants.planted(name):
        first = next(row for row in convert_stage.rows(small_case("wideresnet", 0)) if not row.passed)
    assert first.tensor.startswith(CAUGHT_BY[name]), first
