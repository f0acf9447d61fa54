"""Dense models in: a Hugging Face folder or id, or a GGUF file. Nothing is unpickled, no remote code runs unasked, no weight is
left at random."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .errors import CheckpointError, InputError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_UNLOADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    ImportError,
    AttributeError,
    SafetensorError,
    StrictDataclassError,
)
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


def local_path(model: str) -> Path | None:
    """The folder or file that MODEL names, or None when it reads as a hub id (``owner/name``) and is not there.

    Raises:
        InputError: it reads as a path and is not there.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    parts = model.split("/")
    if model.endswith((".gguf", "/")) or model.startswith((".", "/", "~")) or len(parts) != 2 or not all(parts):
        raise InputError(f"there is no folder or file {model}")
    return None


def check_folder(folder: Path) -> dict[str, Any]:
    """The config of a model folder whose weights can be opened.

    Raises:
        InputError: it is no model folder, or has no safetensors weights.
        CheckpointError: the weights are truncated or corrupt.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is neither a model folder nor a .gguf file")
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f"{folder} has no config.json, so it is no model folder")
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
        assert isinstance(data, dict)
    except (ValueError, AssertionError, OSError) as error:
        raise CheckpointError(f"{config} is not readable JSON: {error}") from error
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as handle:
                handle.keys()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is truncated or corrupt: {error}") from error
    return data


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
        InputError: there are none.
        CheckpointError: the index names a file that is not there.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise CheckpointError(f"{index} is not readable: {error}") from error
        files = [folder / name for name in names]
        for file in files:
            if not file.is_file() or file.parent != folder:
                raise CheckpointError(f"{index} names {file.name}, which is not in {folder}")
        return files
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if any(any(folder.glob(pattern)) for pattern in _PICKLED):
        raise InputError(f"{folder} holds only pickled weights, which are never loaded; save it as safetensors first")
    raise InputError(f"{folder} has no weights ({WEIGHTS})")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Warnings of transformers that the checks here replace are kept off stderr."""
    logger = logging.getLogger("transformers")
    level = logger.level
    bars = transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def load_dense(model: str, *, dtype: torch.dtype | str = torch.float32, trust_remote_code: bool = False) -> PreTrainedModel:
    """A dense model in eval mode on the CPU.

    Args:
        model: a folder, a hub id or a ``.gguf`` file.
        dtype: of the weights; ``"auto"`` for the stored one.
        trust_remote_code: allow the folder's own Python code.

    Raises:
        InputError, CheckpointError: with what is wrong.
    """
    path = local_path(model)
    with quiet_transformers():
        if path is not None and path.is_file():
            loaded = _load_gguf(path, torch.float32 if dtype == "auto" else dtype)
        else:
            config = check_folder(path) if path is not None else None
            loaded = _load_folder(str(path or model), config, dtype, trust_remote_code)
    check_finite(loaded)
    return loaded.eval()


def _load_folder(name: str, data: dict[str, Any] | None, dtype: torch.dtype | str, trust_remote_code: bool) -> PreTrainedModel:
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if data is not None:
        options["local_files_only"] = True
        if data.get("auto_map") and not trust_remote_code and data.get("model_type") not in transformers.CONFIG_MAPPING:
            raise InputError(f"{name} needs Python code of its own; give --trust-remote-code to run it")
    try:
        config = AutoConfig.from_pretrained(name, **options)
        architecture = (getattr(config, "architectures", None) or [""])[0]
        # Any: with output_loading_info, from_pretrained returns a pair, which its types do not say
        loader: Any = getattr(transformers, architecture, None) or AutoModelForCausalLM
        loaded, info = loader.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            **options,
        )
    except _UNLOADABLE as error:
        raise InputError(f"{name} cannot be loaded: {first_line(error)}") from error
    missing, wrong = sorted(info.get("missing_keys") or ()), sorted(str(key[0]) for key in info.get("mismatched_keys") or ())
    if missing or wrong:
        what = f"'{missing[0]}' is missing" if missing else f"'{wrong[0]}' has another shape"
        raise CheckpointError(f"the weights of {name} are not complete: {what} ({len(missing) + len(wrong)} in all)")
    return loaded


def stored_dtype(model: str, *, trust_remote_code: bool = False) -> torch.dtype:
    """The type of a model's weights by its own config (which a load in another type rewrites); float32 for a GGUF file."""
    path = local_path(model)
    if path is not None and path.is_file():
        return torch.float32
    named = getattr(AutoConfig.from_pretrained(str(path or model), trust_remote_code=trust_remote_code), "dtype", None)
    named = getattr(torch, named, None) if isinstance(named, str) else named
    return named if isinstance(named, torch.dtype) and named.is_floating_point else torch.float32


def _load_gguf(path: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """Dequantise a GGUF file into a fresh model; the reader's own quantisation mark would forbid saving."""
    check_gguf(path)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the reader's own progress bar cannot be switched off
            read = AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=dtype, local_files_only=True
            )
    except ImportError as error:
        raise InputError(
            f"reading {path.name} needs more packages: pip install 'moecompile[gguf]' ({first_line(error)})"
        ) from error
    except Exception as error:  # the reader raises whatever a malformed file makes it meet
        raise InputError(f"{path} cannot be read as GGUF: {first_line(error)}") from error
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = type(read)._from_config(config, dtype=read.dtype)
    fresh.load_state_dict(read.state_dict())
    fresh.tie_weights()
    fresh.generation_config = read.generation_config
    return fresh


def check_gguf(path: Path) -> None:
    """Refuse a file that is not GGUF by its first bytes.

    Raises:
        InputError: it is not.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path} is not a GGUF file; give a model folder or a .gguf file")


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that belongs to a model (folder, id or GGUF file).

    Raises:
        InputError: there is none.
    """
    path = local_path(model)
    if path is not None and path.is_dir():
        check_folder(path)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with quiet_transformers():
        try:
            if path is not None and path.is_file():
                return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, **options)
            return AutoTokenizer.from_pretrained(str(path or model), **options)
        except Exception as error:  # tokenizers raises plain Exception for malformed files
            raise InputError(f"{model} has no tokenizer that can be loaded: {first_line(error)}") from error


def check_finite(model: nn.Module) -> None:
    """Refuse weights with NaN or infinity.

    Raises:
        CheckpointError: naming the tensor.
    """
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(f"the weight '{name}' holds {count} values that are NaN or infinite")


def check_tokens(model: nn.Module, rows: Tensor) -> None:
    """Refuse windows of tokens that the model has no embedding for.

    Raises:
        InputError: the tokenizer is another model's, or has words that were added to it alone.
    """
    known = None
    if isinstance(model, PreTrainedModel):
        with contextlib.suppress(NotImplementedError):  # (a kind of model that does not say where they are)
            known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if known is not None and rows.numel() and int(rows.max()) >= known:
        raise InputError(f"the tokenizer gives token {int(rows.max())}, but the model knows {known}: it is not the model's own")


def check_positions(model: nn.Module, length: int, what: str) -> None:
    """Refuse texts longer than the model's positions.

    Raises:
        InputError: they are.
    """
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None)
    if isinstance(longest, int) and length > longest:
        raise InputError(f"{what} is {length} tokens; the model has {longest} positions")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for one-line messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
