"""Converted models on disk: safetensors, config, plan, record, tokenizer, generation config, model card.

The folder's ``model_type`` is ``moecompile``, so that nothing can load it by mistake as the dense architecture with random
FFNs. After ``import moecompile`` the Auto classes of transformers load it. A load is bit for bit what was saved.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Hashable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from .apply import install
from .block import MoEFFN
from .card import model_card
from .errors import CheckpointError, InputError
from .files import explain_os_error, new_folder, read_json, write_bytes, write_tensors
from .front import pregated
from .hub import INDEX, WEIGHTS, check_folder, first_line, local_path, quiet_transformers, weight_files
from .plans import MoEPlan, dump_plan
from .version import __version__

PLAN, RECORD = "moe_plan.json", "moecompile.json"
MODEL_TYPE = "moecompile"


class MoECompileConfig(PretrainedConfig):
    """The config of a converted folder.

    Attributes:
        base_config: the dense model's own config, as a dict.
        num_experts, num_experts_per_tok, moe_intermediate_size: of the first FFN.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        base_config: dict[str, Any] | None = None,
        num_experts: int = 0,
        num_experts_per_tok: int = 0,
        moe_intermediate_size: int = 0,
        **kwargs: Any,
    ) -> None:
        self.base_config = base_config or {}
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        super().__init__(**kwargs)


class MoEModelMixin:
    """What a converted transformers model does otherwise: it saves as a converted folder."""

    moecompile_plan: MoEPlan
    moecompile_record: dict[str, Any]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """The class is made at run time: a copy or a pickle names the dense one."""
        own = next(kind for kind in type(self).__mro__ if kind.__bases__[:1] == (MoEModelMixin,))
        return _bare, (own.__bases__[1], "forward" in own.__dict__), self.__dict__

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        **kwargs: Any,
    ) -> None:
        """As transformers' own: writes into ``save_directory``, each file whole or not at all.

        Raises:
            InputError: ``push_to_hub`` is asked for.
            CheckpointError: the files cannot be written.
        """
        if push_to_hub:
            raise InputError("push_to_hub is not supported for converted models; save the folder, then upload it")
        if not is_main_process:
            return
        folder = Path(save_directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=".moecompile.", suffix=".part", dir=folder))
        except OSError as error:
            raise explain_os_error(error, folder) from error
        try:
            write_files(self, aside, state_dict=state_dict, max_shard_size=max_shard_size)  # type: ignore[arg-type]
            new = {file.name for file in aside.iterdir()}
            for name in new:
                os.replace(aside / name, folder / name)
            for old in (folder / WEIGHTS, folder / INDEX, *folder.glob("model-*-of-*.safetensors")):
                if old.name not in new:  # an earlier save's shards would be taken for the new weights
                    old.unlink(missing_ok=True)
        except OSError as error:
            raise explain_os_error(error, folder) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@cache
def _moe_class(base: type[PreTrainedModel], front: bool) -> type[PreTrainedModel]:
    """The dense class with :class:`MoEModelMixin` on top, under the dense class's name; with a router at its ``front``."""
    own: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    if front:
        own["forward"] = pregated(base)
    return type(base.__name__, (MoEModelMixin, base), own)


@cache
def _front_class(base: type[nn.Module]) -> type[nn.Module]:
    """A module's class with a router at its front."""
    own = {"__module__": base.__module__, "__qualname__": base.__qualname__, "forward": pregated(base), "moecompile_base": base}
    return type(base.__name__, (base,), own)


def _bare(base: type[PreTrainedModel], front: bool) -> PreTrainedModel:
    """A converted model without its attributes, which follow."""
    kind = _moe_class(cast(Hashable, base), front)
    return cast(PreTrainedModel, object.__new__(kind))


def adopt(model: nn.Module, plan: MoEPlan, record: Mapping[str, Any] | None = None) -> nn.Module:
    """Mark a module as converted by a plan, so that it can be saved; a transformers model saves by ``save_pretrained`` too."""
    model.moecompile_plan = plan.without_tensors()  # type: ignore[assignment]
    model.moecompile_record = dict(record or {})  # type: ignore[assignment]
    if isinstance(model, PreTrainedModel):
        base = type(model).__bases__[1] if isinstance(model, MoEModelMixin) else type(model)
        # cast: mypy takes the instances' __hash__ for that of the class
        model.__class__ = _moe_class(cast(Hashable, base), plan.pregate is not None)
    elif plan.pregate is not None and not isinstance(model, GraphModule):  # (in a graph the router is a node)
        model.__class__ = _front_class(cast(Hashable, getattr(type(model), "moecompile_base", type(model))))
    return model


def save(
    model: nn.Module,
    path: str | Path,
    *,
    tokenizer: Any = None,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a converted model; the folder is there whole or not at all.

    Args:
        model: what :func:`moecompile.convert` returned.
        path: a folder that does not exist yet, or ``overwrite``.
        tokenizer: saved beside the model.
        record: what was measured; shown in the model card and the report.

    Raises:
        InputError: the folder exists, or the model was not converted.
        CheckpointError: it cannot be written.
    """
    if not isinstance(getattr(model, "moecompile_plan", None), MoEPlan):
        raise InputError("the model was not converted by moecompile, so there is no plan to save with it")
    folder = Path(path)
    if record is not None:
        model.moecompile_record = dict(record)  # type: ignore[assignment]
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    with new_folder(folder, overwrite, needed_bytes=size + (8 << 20)) as aside:
        write_files(model, aside, tokenizer=tokenizer, max_shard_size=max_shard_size)
    return folder


def write_files(
    model: nn.Module,
    folder: Path,
    *,
    tokenizer: Any = None,
    state_dict: dict[str, Tensor] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """All files of a converted folder, into a folder that exists."""
    plan: MoEPlan = model.moecompile_plan  # type: ignore[assignment]
    record: dict[str, Any] = model.moecompile_record  # type: ignore[assignment]
    tensors = without_aliases(state_dict if state_dict is not None else model.state_dict())
    shards = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for name, keys in shards.filename_to_tensors.items():
        write_tensors(folder / name, {key: tensors[key] for key in keys}, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_bytes(folder / INDEX, json.dumps(index, indent=2).encode())
    write_bytes(folder / "config.json", json.dumps(_config_of(model, plan), indent=2).encode())
    write_bytes(folder / PLAN, (dump_plan(plan.to_dict()) + "\n").encode())
    write_bytes(folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())
    write_bytes(folder / "README.md", model_card(record, plan).encode())
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        with quiet_transformers():
            try:
                generation.save_pretrained(folder)
            except ValueError:  # settings that contradict each other, as the dense model had them
                generation.to_json_file(folder / "generation_config.json")
    if tokenizer is not None:
        try:
            tokenizer.save_pretrained(folder)
        except OSError:
            raise
        except Exception as error:  # tokenizers raises plain Exception, also where the disk is full
            raise CheckpointError(f"the tokenizer cannot be written: {first_line(error)}") from error


def _config_of(model: nn.Module, plan: MoEPlan) -> dict[str, Any]:
    spec = plan.sites[0].block_spec()
    config: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "architectures": [type(model).__name__],
        "moecompile_version": __version__,
        "num_experts": spec.experts,
        "num_experts_per_tok": plan.top_k,
        "moe_intermediate_size": spec.expert_width,
    }
    if isinstance(model, PreTrainedModel):
        base = model.config.to_dict()
        base["dtype"] = str(model.dtype).removeprefix("torch.")
        config.update(base_config=base, dtype=base["dtype"], transformers_version=transformers.__version__)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "hidden_size", "num_hidden_layers"):
            if base.get(name) is not None:
                config[name] = base[name]
    return config


def without_aliases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which tied tensors stand once, under the first of their names."""
    seen: set[tuple[int, int | torch.SymInt, torch.Size, tuple[int, ...]]] = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in state.items():
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or key not in seen:
            kept[name] = tensor
            seen.add(key)
    return kept


def is_converted(path: str | Path) -> bool:
    """Whether a folder is a converted model."""
    config = Path(path) / "config.json"
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") == MODEL_TYPE
    except (OSError, ValueError, AttributeError):
        return False


def load(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
) -> nn.Module:
    """A converted model, in eval mode, bit for bit as it was saved.

    Args:
        path: a converted folder.
        model: the dense module to convert in place, for a model that is not of transformers.
        dtype: cast to it after loading; as saved by default (also for ``"auto"``).
        device: move there after loading.

    Raises:
        InputError, CheckpointError: with what is wrong.
    """
    folder = local_path(str(path))
    if folder is None:
        raise InputError(f"there is no folder {path}")
    wanted = None if dtype == "auto" else getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if wanted is not None and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise InputError(f"dtype is {dtype!r}; it must be a floating-point type of torch, or its name")
    config = check_folder(folder)
    if config.get("model_type") != MODEL_TYPE:
        raise InputError(
            f"{folder} is not a converted model (its model_type is {config.get('model_type')!r}); convert it first"
        )
    plan = MoEPlan.from_dict(read_json(folder / PLAN))
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    target = model if model is not None else _empty_model(folder, config)
    blocks = [MoEFFN(site.block_spec()) for site in plan.sites]
    install(target, plan, blocks)
    _fill(target, folder)
    adopt(target, plan, record)
    if wanted is not None:
        cast_weights(target, wanted)
    if device is not None:
        target.to(device)
    return target.eval()


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A model's floating-point weights in another type, in place. What is no part of its state, such as rotary frequencies,
    keeps its precision, as where transformers loads in a type: rounded, they would turn far positions elsewhere."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to(dtype)
    return model


def _empty_model(folder: Path, config: dict[str, Any]) -> PreTrainedModel:
    """The dense architecture without initialising a weight."""
    from transformers.initialization import no_init_weights

    base, names = config.get("base_config"), config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    architecture = getattr(transformers, name, None)
    if not base or not (isinstance(architecture, type) and issubclass(architecture, PreTrainedModel)):
        raise InputError(
            f"{folder} holds a {name or 'module'}, which transformers does not have: give load(..., model=) the dense module"
        )
    try:
        settings = dict(base)
        dense_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        with quiet_transformers(), no_init_weights():
            model = architecture._from_config(dense_config)
            if (folder / "generation_config.json").is_file() and hasattr(model, "generation_config"):
                model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        model.tie_weights()
        return model
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        raise CheckpointError(f"the model of {folder} cannot be built from its config: {first_line(error)}") from error


def _fill(model: nn.Module, folder: Path) -> None:
    """Put the stored tensors into the model; every parameter must come from the file or be tied to one that does.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape.
    """
    stored: dict[str, Tensor] = {}
    for file in weight_files(folder):
        stored.update(load_file(file))
    own = model.state_dict()
    unknown = sorted(set(stored) - set(own))
    wrong = sorted(name for name in set(stored) & set(own) if stored[name].shape != own[name].shape)
    if unknown or wrong:
        what = f"'{unknown[0]}' has no place in the model" if unknown else f"'{wrong[0]}' has another shape"
        raise CheckpointError(f"the weights of {folder} do not fit its plan: {what}")
    aliases: dict[tuple[int, int], set[str]] = {}
    for name, tensor in own.items():
        aliases.setdefault((tensor.untyped_storage().data_ptr(), tensor.storage_offset()), set()).add(name)
    tied = {name: group for group in aliases.values() for name in group if len(group) > 1}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in sorted(set(own) - set(stored)):
        source = next((other for other in tied.get(name, ()) if other in stored), None)
        if source is None and own[name].numel():
            raise CheckpointError(f"the weights of {folder} are not complete: '{name}' is missing")
        if source is not None:
            if {name, source} <= set(parameters) and not isinstance(stored[source], nn.Parameter):  # one object for both
                stored[source] = nn.Parameter(stored[source], requires_grad=parameters[source].requires_grad)
            stored[name] = stored[source]
    model.load_state_dict(stored, strict=False, assign=True)
    tie_weights: Any = getattr(model, "tie_weights", None)  # of transformers models
    if tie_weights is not None:
        tie_weights()


class _Loader(PreTrainedModel):
    """What the Auto classes of transformers call for a converted folder; the model it returns is the converted architecture."""

    config_class = MoECompileConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load a converted folder, or a hub id of one.

        Raises:
            InputError, CheckpointError: with what is wrong.
        """
        name = str(pretrained_model_name_or_path)
        if local_path(name) is None:
            from huggingface_hub import snapshot_download

            try:
                name = snapshot_download(name, revision=kwargs.get("revision"), cache_dir=kwargs.get("cache_dir"))
            except Exception as error:  # many types, all of them 'it cannot be had'
                raise InputError(f"{name} cannot be downloaded: {first_line(error)}") from error
        device_map = kwargs.get("device_map")
        if device_map is not None and not isinstance(device_map, (str, torch.device, int)):
            raise InputError("a converted model goes to one device; give device_map as its name")
        device = None if device_map in (None, "auto") else device_map
        try:
            device = device if device is None else torch.device(device)
        except RuntimeError:
            raise InputError(f"device_map is '{device_map}'; a converted model goes to one device, such as 'cuda:0'") from None
        model = load(name, dtype=kwargs.get("dtype") or kwargs.get("torch_dtype"), device=device)
        # The Auto classes put it into the config.
        attention = kwargs.get("attn_implementation") or getattr(kwargs.get("config"), "_attn_implementation", None)
        if attention is not None:
            model.set_attn_implementation(attention)  # type: ignore[operator]
        return (model, {}) if kwargs.get("output_loading_info") else model


def register() -> None:
    """Make converted folders known to transformers' Auto classes."""
    AutoConfig.register(MODEL_TYPE, MoECompileConfig, exist_ok=True)
    for name in dir(transformers):
        auto = getattr(transformers, name) if name.startswith("AutoModel") else None
        if isinstance(auto, type) and hasattr(auto, "register") and hasattr(auto, "_model_mapping"):
            auto.register(MoECompileConfig, _Loader, exist_ok=True)


def record_of(path: str | Path) -> dict[str, Any]:
    """The record of a converted folder.

    Raises:
        InputError: the folder is not a converted model.
    """
    folder = Path(path)
    if not is_converted(folder):
        raise InputError(f"{folder} is not a converted model")
    return read_json(folder / RECORD)


def exact(model: nn.Module, record: Mapping[str, Any]) -> bool:
    """Whether all experts on is the dense model: converted so (:attr:`MoEPlan.exact`), and nothing but its routers tuned since.

    Args:
        model: a converted model.
        record: its folder's.
    """
    plan: MoEPlan = model.moecompile_plan  # type: ignore[union-attr, assignment]
    return plan.exact and all(run.get("stage") == ["router"] for run in record.get("tuning") or ())


def update_record(path: str | Path, record: dict[str, Any]) -> None:
    """Write a changed record, and the model card that shows it.

    Raises:
        CheckpointError: it cannot be written.
    """
    folder = Path(path)
    plan = MoEPlan.from_dict(read_json(folder / PLAN))
    write_bytes(folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())
    write_bytes(folder / "README.md", model_card(record, plan).encode())


__all__ = [
    "MoECompileConfig",
    "adopt",
    "is_converted",
    "load",
    "record_of",
    "register",
    "save",
    "update_record",
]
