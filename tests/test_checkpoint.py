"""Converted models on disk: bit for bit out as in, for every family, and refused where something does not fit."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import BY_NAME, FAMILIES, Family, batch_of
from gguf_files import write_llama
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moecompile
from moecompile import CheckpointError, InputError, MatchError, MoECompileError, PlanError, hub
from moecompile.conversion import convert_with_record
from moecompile.parity import outputs_of
from moecompile.plans import MoEPlan
from moecompile.recipes import Contiguous, RandomSplit, Static

CAUSAL = [family for family in FAMILIES if family.causal]
RECIPE = Contiguous(experts=4, shared=1, top_k=2)  # 48 neurons as 5 slices: of 10 and 9, so experts are padded
WEIGHTS, PLAN = "model.safetensors", "moe_plan.json"


@cache
def converted(name: str, **changes: Any) -> nn.Module:
    """A family's model, converted once; tests copy it before they change it."""
    return moecompile.convert(BY_NAME[name].build(**changes), RECIPE)


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes, so that -0 is not 0."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def check_same_tensors(ours: nn.Module, theirs: nn.Module) -> None:
    """The same names, types and bits, buffers that are not saved included."""
    a, b = tensors_of(ours), tensors_of(theirs)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and tensor.shape == b[name].shape, name
        assert torch.equal(bits(tensor), bits(b[name])), name


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under each of their names."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return {**named, **dict(model.named_buffers(remove_duplicate=False))}


def check_same_outputs(ours: nn.Module, theirs: nn.Module, batch: Any) -> None:
    """The same outputs, bit for bit."""
    for a, b in zip(outputs_of(ours, batch), outputs_of(theirs, batch), strict=True):
        assert torch.equal(bits(a), bits(b))


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted Llama; tests copy it before they spoil it."""
    return moecompile.save(converted("llama"), tmp_path_factory.mktemp("llama") / "moe")


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(llama_folder, tmp_path / "moe"))


# Every family


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_round_trip(family: Family, tmp_path: Path) -> None:
    model = converted(family.name)
    assert moecompile.save(model, tmp_path / "moe") == tmp_path / "moe"
    loaded = moecompile.load(tmp_path / "moe")
    assert type(loaded).__name__ == family.model and not loaded.training
    assert len(moecompile.moe_blocks(loaded)) == family.ffns
    assert {block.top_k for block in moecompile.moe_blocks(loaded).values()} == {2}
    check_same_tensors(loaded, model)
    check_same_outputs(loaded, model, batch_of(family))
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in loaded.named_parameters()} == trained


@pytest.mark.parametrize("family", CAUSAL, ids=lambda family: family.name)
def test_auto_class_and_generation(family: Family, tmp_path: Path) -> None:
    model = converted(family.name)
    moecompile.save(model, tmp_path / "moe")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert isinstance(loaded, getattr(transformers, family.model))
    prompt = batch_of(family)["input_ids"]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(prompt)
    ours, theirs = (m.generate(prompt, attention_mask=mask, **options) for m in (loaded, model))
    assert ours.shape[1] == prompt.shape[1] + 12 and torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "auto"),
    [("bert", "AutoModelForMaskedLM"), ("t5", "AutoModelForSeq2SeqLM"), ("vit", "AutoModelForImageClassification")],
)
def test_other_auto_classes(name: str, auto: str, tmp_path: Path) -> None:
    converted(name).save_pretrained(tmp_path / "moe")
    loaded = getattr(transformers, auto).from_pretrained(tmp_path / "moe")
    check_same_outputs(loaded, converted(name), batch_of(BY_NAME[name]))


def test_config_by_auto_class(folder: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.model_type == "moecompile" and config.base_config["model_type"] == "llama"
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (4, 2, 10)


def test_compensation_and_exact_copy_survive(tmp_path: Path) -> None:
    family = BY_NAME["gpt2"]
    recipe = Static(active_fraction=0.5, compensation="refit")
    batch = batch_of(family, tokens=40)
    model = moecompile.convert(family.build(), recipe, [batch], keep_exact=True)
    loaded = moecompile.load(moecompile.save(model, tmp_path / "moe"))
    check_same_tensors(loaded, model)
    for k in (0, None):
        for m in (loaded, model):
            moecompile.set_top_k(m, k)
        check_same_outputs(loaded, model, batch)


def test_what_was_loaded_can_be_saved_again(folder: Path, tmp_path: Path) -> None:
    again = moecompile.save(moecompile.load(folder), tmp_path / "again")
    assert (again / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert json.loads((again / PLAN).read_text()) == json.loads((folder / PLAN).read_text())
    assert json.loads((again / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_record_is_kept(tmp_path: Path) -> None:
    record = {"source": "tiny", "numbers": [1, 2.5], "evaluations": []}
    path = moecompile.save(copy.deepcopy(converted("llama")), tmp_path / "moe", record=record)
    assert moecompile.load(path).moecompile_record == record
    assert "tiny" in (path / "README.md").read_text()


def test_loaded_model_trains(folder: Path) -> None:
    model = moecompile.load(folder)
    batch = batch_of(BY_NAME["llama"])["input_ids"]
    model(input_ids=batch, labels=batch).loss.backward()
    grads = [parameter.grad for name, parameter in model.named_parameters() if "experts" in name]
    assert grads and all(grad is not None and torch.isfinite(grad).all() for grad in grads)


# Saving


def test_save_pretrained_keeps_other_files(tmp_path: Path) -> None:
    target = tmp_path / "moe"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    (target / "config.json").write_text("old")
    converted("llama").save_pretrained(target)
    assert (target / "notes.txt").read_text() == "mine"
    assert not list(target.glob(".*"))
    check_same_tensors(moecompile.load(target), converted("llama"))


def test_save_pretrained_replaces_old_shards(tmp_path: Path) -> None:
    """What an earlier save in several files left behind does not stand in for the new weights."""
    target = tmp_path / "moe"
    converted("llama").save_pretrained(target, max_shard_size="20KB")
    changed = copy.deepcopy(converted("llama"))
    with torch.no_grad():
        changed.lm_head.weight.add_(1)
    changed.save_pretrained(target)
    check_same_tensors(moecompile.load(target), changed)
    assert [path.name for path in target.glob("*.safetensors*")] == [WEIGHTS]
    changed.save_pretrained(target, max_shard_size="20KB")
    converted("llama").save_pretrained(target, max_shard_size="50KB")
    check_same_tensors(moecompile.load(target), converted("llama"))


def test_save_does_not_touch_what_is_there(folder: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match="exists already"):
        moecompile.save(converted("gpt2"), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    moecompile.save(converted("gpt2"), folder, overwrite=True)
    assert type(moecompile.load(folder)).__name__ == "GPT2LMHeadModel"
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_dense_models_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not converted"):
        moecompile.save(BY_NAME["llama"].build(), tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_no_push_to_the_hub(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="push_to_hub"):
        converted("llama").save_pretrained(tmp_path / "moe", push_to_hub=True)


def test_dense_class_is_left_alone(tmp_path: Path) -> None:
    converted("llama")
    dense = BY_NAME["llama"].build()
    dense.save_pretrained(tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_shards(name: str, tmp_path: Path) -> None:
    path = moecompile.save(converted(name), tmp_path / "moe", max_shard_size="20KB")
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (path / WEIGHTS).exists()
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert {shard.name for shard in shards} == set(index["weight_map"].values())
    check_same_tensors(moecompile.load(path), converted(name))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=shards[1].name):
        moecompile.load(path)


@pytest.mark.parametrize(
    ("name", "changes"), [("gpt2", {}), ("gemma2", {}), ("t5", {}), ("llama", {"tie_word_embeddings": True})]
)
def test_tied_embeddings_stay_tied(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = converted(name, **changes)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    path = moecompile.save(model, tmp_path / "moe")
    loaded = moecompile.load(path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    stored = load_file(path / WEIGHTS)
    assert sum(tensor.shape == model.get_input_embeddings().weight.shape for tensor in stored.values()) == 1
    check_same_tensors(loaded, model)


def test_untied_embeddings_stay_apart(folder: Path) -> None:
    loaded = moecompile.load(folder)
    assert loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox", "bert"])
def test_bfloat16_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = copy.deepcopy(converted(name)).to(torch.bfloat16)
    loaded = moecompile.load(moecompile.save(model, tmp_path / "moe"))
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    own = dict(model.named_parameters())
    assert all(torch.equal(bits(parameter), bits(own[name])) for name, parameter in loaded.named_parameters())
    batch = batch_of(BY_NAME[name])
    for a, b in zip(outputs_of(loaded, batch), outputs_of(model, batch), strict=True):
        assert a.dtype == torch.bfloat16 and torch.allclose(a, b, atol=0.05)


# Loading


def test_loads_only_with_moecompile(folder: Path) -> None:
    """Without the package the folder is refused; it is never taken for the dense architecture with random FFNs."""
    code = (
        "import sys, transformers\n"
        "assert 'moecompile' not in sys.modules\n"
        "for kind in ('AutoModelForCausalLM', 'AutoModel', 'AutoConfig'):\n"
        "    try:\n"
        "        getattr(transformers, kind).from_pretrained(sys.argv[1])\n"
        "    except ValueError as error:\n"
        "        assert 'moecompile' in str(error), error\n"
        "    else:\n"
        "        sys.exit(kind + ' loaded it')\n"
        "print('refused')\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout == "refused\n", done.stdout + done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float64])
def test_dtype(folder: Path, dtype: Any) -> None:
    wanted = torch.bfloat16 if dtype == "bfloat16" else dtype
    for loaded in (
        moecompile.load(folder, dtype=dtype),
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
    ):
        assert {p.dtype for p in loaded.parameters()} == {wanted}
        own = dict(converted("llama").named_parameters())
        assert all(torch.equal(parameter, own[name].to(wanted)) for name, parameter in loaded.named_parameters())


@pytest.mark.parametrize("dtype", [None, "auto"])
def test_dtype_as_saved(folder: Path, dtype: Any) -> None:
    check_same_tensors(moecompile.load(folder, dtype=dtype), converted("llama"))
    check_same_tensors(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), converted("llama"))


@pytest.mark.parametrize("dtype", ["float31", "nn", torch.int8])
def test_dtype_that_is_none(folder: Path, dtype: Any) -> None:
    with pytest.raises(InputError, match="dtype"):
        moecompile.load(folder, dtype=dtype)


def test_device(folder: Path) -> None:
    for device in ("cpu", torch.device("cpu")):
        loaded = moecompile.load(folder, device=device)
        assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    meta = moecompile.load(folder, device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    with pytest.raises(InputError, match="device_map"):
        transformers.AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})


def test_dense_folders_are_refused(dense_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a converted model"):
        moecompile.load(dense_folder)
    with pytest.raises(InputError, match="nowhere"):
        moecompile.load(tmp_path / "nowhere")


# Folders that do not fit


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite a folder's weights."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


EXPERT = "model.layers.1.mlp.experts.down_proj"


def test_missing_tensor(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop(EXPERT))
    with pytest.raises(CheckpointError, match=f"'{EXPERT}' is missing"):
        moecompile.load(folder)
    with pytest.raises(CheckpointError, match=f"'{EXPERT}' is missing"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_missing_tied_tensor(tmp_path: Path) -> None:
    folder = moecompile.save(converted("gpt2"), tmp_path / "moe")
    change_weights(folder, lambda tensors: tensors.pop("transformer.wte.weight"))
    with pytest.raises(CheckpointError, match=r"'(transformer.wte|lm_head).weight' is missing"):
        moecompile.load(folder)


def test_unknown_tensor(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({"model.layers.7.mlp.up": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"'model\.layers\.7\.mlp\.up' has no place"):
        moecompile.load(folder)


def test_tensor_of_another_shape(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({EXPERT: tensors[EXPERT][:3].clone()}))
    with pytest.raises(CheckpointError, match=f"'{EXPERT}' has another shape"):
        moecompile.load(folder)


def test_truncated_weights(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is truncated or corrupt"):
        moecompile.load(folder)


def test_weights_and_plan_are_both_needed(folder: Path) -> None:
    (folder / PLAN).unlink()
    with pytest.raises(InputError, match=PLAN):
        moecompile.load(folder)


def test_record_is_not_needed(folder: Path) -> None:
    (folder / "moecompile.json").unlink()
    assert moecompile.load(folder).moecompile_record == {}


def change_plan(folder: Path, change: Callable[[Any], object]) -> None:
    """Rewrite a folder's plan."""
    data = json.loads((folder / PLAN).read_text())
    change(data)
    (folder / PLAN).write_text(json.dumps(data))


def set_in(*path: Any, value: Any) -> Callable[[Any], None]:
    """Set one entry deep inside a plan."""

    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_in("format", value=99), "format is 99"),
        (lambda data: data.pop("sites"), "sites"),
        (set_in("sites", value=7), "not readable"),
        (set_in("sites", 0, value="x"), "not readable"),
        (lambda data: data["sites"][0].pop("experts"), "experts"),
        (lambda data: data["sites"][0]["site"].pop("down"), "down"),
        (set_in("sites", 0, "experts", 0, 0, value=47), "layers.0.mlp: .*each of 48 neurons once"),
        (set_in("sites", 0, "experts", 0, 0, value="x"), "not readable"),
        (set_in("sites", 1, "shared", value=[]), "layers.1.mlp: .*neuron 0 has no place"),
        (set_in("sites", 0, "top_k", value=5), "top_k is 5"),
        (set_in("sites", 0, "router", value="oracle"), "no router 'oracle'"),
        (set_in("sites", 0, "router", value="none"), "there is no router"),
        (set_in("sites", 0, "site", "activation", value="zap"), "zap"),
        (set_in("sites", 0, "site", "placement", "block", value="model.trunk.0.mlp"), "no module 'model.trunk.0.mlp'"),
        (set_in("sites", 0, "site", "placement", "block", value="model.layers.0.ffn"), "no module 'model.layers.0.ffn"),
        (set_in("sites", 0, "site", "placement", "bypass", value=["model.gone"]), "no module 'model.gone'"),
        (set_in("sites", 0, "site", "placement", value=None), "cannot be replaced"),
        (lambda data: data["sites"].pop(), "do not fit its plan"),
        (set_in("sites", value=[]), "no sites"),
        (set_in("sites", 0, "site", "hidden_size", value=16), "has another shape"),
        (set_in("sites", 0, "fitted", value=["means"]), "missing"),
    ],
)
def test_corrupt_plan(folder: Path, change: Callable[[Any], object], reason: str) -> None:
    change_plan(folder, change)
    with pytest.raises(MoECompileError, match=reason):
        moecompile.load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_plan_that_is_no_json(folder: Path, content: bytes) -> None:
    (folder / PLAN).write_bytes(content)
    with pytest.raises(InputError, match=PLAN):
        moecompile.load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["NoSuchModel"]},
        {"architectures": []},
        {"architectures": ["pipeline"]},
        {"architectures": ["AutoModelForCausalLM"]},
        {"architectures": 5},
        {"base_config": {}},
        {"base_config": [1]},
        {"base_config": {"model_type": "no-such-type"}},
        {"base_config": {"vocab_size": 99}},
        {"base_config": {"model_type": "llama", "hidden_size": "wide"}},
    ],
)
def test_corrupt_config(folder: Path, changes: dict[str, Any]) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises((InputError, CheckpointError, PlanError)) as caught:
        moecompile.load(folder)
    assert str(folder) in str(caught.value)


# Other modules


class Feed(nn.Module):
    """One feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, 16) -> (B, S, 16)."""
        return self.down(nn.functional.gelu(self.up(x)))


class Tower(nn.Module):
    """Plain PyTorch: two feed-forward networks between an embedding and a head that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.layers = nn.ModuleList(Feed() for _ in range(2))
        self.register_buffer("scale", torch.tensor([0.5]))
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """(B, S) -> (B, S, 30)."""
        x = self.embed(ids) * self.scale
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


@pytest.fixture
def tower() -> tuple[nn.Module, Tensor]:
    """(a converted tower, a batch)."""
    torch.manual_seed(3)
    batch = torch.randint(0, 30, (2, 7))
    model = Tower().eval()
    with torch.no_grad():
        model.scale.fill_(0.75)
    return moecompile.convert(model, RECIPE, example_inputs=(batch,)), batch


def test_plain_module_round_trip(tower: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    model, batch = tower
    path = moecompile.save(model, tmp_path / "moe")
    torch.manual_seed(4)
    fresh = Tower()
    loaded = moecompile.load(path, model=fresh)
    assert loaded is fresh and len(moecompile.moe_blocks(loaded)) == 2 and not loaded.training
    check_same_tensors(loaded, model)
    assert torch.equal(loaded(batch), model(batch))
    assert loaded.head.weight is loaded.embed.weight


def test_plain_module_needs_a_model(tower: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    path = moecompile.save(tower[0], tmp_path / "moe")
    with pytest.raises(InputError, match=r"Tower.*model="):
        moecompile.load(path)


def test_plain_module_of_another_shape(tower: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    path = moecompile.save(tower[0], tmp_path / "moe")
    other = Tower()
    other.embed = nn.Embedding(31, 16)
    with pytest.raises(CheckpointError, match=r"'embed\.weight' has another shape"):
        moecompile.load(path, model=other)
    with pytest.raises(PlanError, match="no module"):
        moecompile.load(path, model=nn.Linear(2, 2))


def test_plan_file_round_trip(tmp_path: Path) -> None:
    model = BY_NAME["llama"].build()
    plan = moecompile.plan(model, RECIPE)
    plan.save(tmp_path / "plan.json")
    read = MoEPlan.load(tmp_path / "plan.json")
    assert read.to_dict() == plan.to_dict()
    check_same_tensors(moecompile.convert(model, read), converted("llama"))
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(PlanError, match=r"plan\.safetensors"):
        MoEPlan.load(tmp_path / "plan.json")


# Dense models in


@pytest.mark.parametrize("tied", [False, True])
def test_gguf(tmp_path: Path, tied: bool) -> None:
    pytest.importorskip("gguf")
    model = BY_NAME["llama"].build(tie_word_embeddings=tied)
    loaded = hub.load_dense(str(write_llama(model, tmp_path / "tiny.gguf")))
    own = dict(model.named_parameters())
    assert all(torch.equal(parameter, own[name]) for name, parameter in loaded.named_parameters())
    check_same_outputs(loaded, model, batch_of(BY_NAME["llama"]))
    path = moecompile.save(moecompile.convert(loaded, RECIPE), tmp_path / "moe")
    expected = converted("llama", tie_word_embeddings=True) if tied else converted("llama")
    check_same_outputs(moecompile.load(path), expected, batch_of(BY_NAME["llama"]))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_dense_folder(family: Family, tmp_path: Path) -> None:
    model = family.build()
    model.save_pretrained(tmp_path / "dense")
    loaded = hub.load_dense(str(tmp_path / "dense"))
    assert type(loaded) is type(model) and not loaded.training
    check_same_tensors(loaded, model)


def test_dense_dtype(dense_folder: Path) -> None:
    assert hub.load_dense(str(dense_folder), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert hub.load_dense(str(dense_folder), dtype="auto").dtype == torch.float32


def test_loading_in_a_type_keeps_the_rotary_frequencies(tmp_path: Path) -> None:
    dense = BY_NAME["llama"].build()
    moecompile.convert(dense, Contiguous(4, 0, 4)).save_pretrained(tmp_path / "moe")
    loaded = moecompile.load(tmp_path / "moe", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, dense.model.rotary_emb.inv_freq, rtol=0, atol=0)


def test_layers_converted_one_after_the_other(tmp_path: Path) -> None:
    dense, batch = BY_NAME["llama"].build(), batch_of(BY_NAME["llama"])
    model = dense
    for layer in (1, 0):
        wanted = f"layers.{layer}.mlp"
        model = moecompile.convert(model, Contiguous(4, 2, 4), filter_fn=lambda _m, name, wanted=wanted: name.endswith(wanted))
    assert len(moecompile.moe_blocks(model)) == 2
    model.save_pretrained(tmp_path / "moe")
    again = moecompile.load(tmp_path / "moe")
    with torch.no_grad():
        expected, ours = (m.eval()(**batch).logits for m in (dense, again))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    for converted in (model, again):
        with pytest.raises(MatchError, match="converted already"):
            moecompile.convert(converted, Contiguous(2, 0, 2))


def test_layers_converted_in_two_steps_cost_what_they_cost_in_one() -> None:
    for family in ("llama", "gpt2", "phi3"):
        dense, recipe = BY_NAME[family].build(), RandomSplit(4, 0, 2)
        whole = convert_with_record(dense, recipe)
        one = moecompile.convert(dense, recipe, filter_fn=lambda _m, name: ".0." in name)
        both = convert_with_record(one, recipe, filter_fn=lambda _m, name: ".1." in name)
        assert both.costs == whole.costs, family


def test_a_generation_config_that_contradicts_itself_is_kept(tmp_path: Path) -> None:
    model = moecompile.convert(BY_NAME["llama"].build(), Contiguous(4, 0, 4))
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, False
    model.save_pretrained(tmp_path / "moe")
    assert json.loads((tmp_path / "moe" / "generation_config.json").read_text())["temperature"] == 0.5
    assert moecompile.load(tmp_path / "moe").generation_config.temperature == 0.5


def test_what_the_auto_classes_are_asked_for(folder: Path) -> None:
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, attn_implementation="eager", device_map="cpu")
    assert model.config._attn_implementation == "eager" and model.device.type == "cpu"
    assert auto.from_pretrained(folder).config._attn_implementation == "sdpa"
    with pytest.raises(InputError, match="device_map is 'sequential'"):
        auto.from_pretrained(folder, device_map="sequential")
