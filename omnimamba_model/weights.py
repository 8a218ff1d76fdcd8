"""Checkpoints: a folder with config.json and safetensors, saved whole or not at all, loaded strictly.

config.json                     the sizes, with "model_type"
model.safetensors               the weights, or
model.safetensors.index.json    {"weight_map": {tensor: file}} and the files that it names
tokenizer.json                  where the model has one
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .backbone import MambaLM, cast_matrices
from .config import MambaConfig, OmniMambaConfig
from .files import absent, write_whole
from .omnimamba import OmniMamba

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""What safetensors calls the dtypes that weights may have."""
_KINDS: dict[str, tuple[type, type]] = {"omnimamba": (OmniMamba, OmniMambaConfig), "mamba2": (MambaLM, MambaConfig)}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or does not fit its own config."""


def save(
    model: OmniMamba | MambaLM,
    folder: str | Path,
    tokenizer: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the model, its config and, where given, a tokenizer (tokenizer.json's text) into ``folder``.

    Each file is written under a temporary name and renamed, once the weights are whole, and what names them comes last:
    a save that fails leaves the checkpoint that was there before, and no torn file. Tied heads own no parameters, so
    their tables are stored once. Weights of more than ``max_shard_bytes`` are cut into shards of at most that size.
    """
    write(model, model.state_dict(), Path(folder), tokenizer, max_shard_bytes)


def write(
    model: OmniMamba | MambaLM,
    state: Mapping[str, Tensor],
    folder: Path,
    tokenizer: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """``save`` with the tensors given: a model whose parameters are shared by many processes gathers them first."""
    if getattr(model, "merged", None) is not None:
        raise ValueError("an adapter is merged into the model's weights, and would be added again; save before merging")
    if any(tensor.dtype is torch.int8 for tensor in state.values()):
        raise ValueError("int8 weights are made when a model is loaded; save the model that they were made from")
    folder.mkdir(parents=True, exist_ok=True)
    kind = next(name for name, (model_type, _) in _KINDS.items() if isinstance(model, model_type))
    config = {"model_type": kind, **model.config.to_dict()}

    def describe() -> None:
        """The small files, which fit other weights than those that may be there."""
        if tokenizer is not None:
            write_whole(folder / TOKENIZER, lambda path: path.write_text(tokenizer, encoding="utf-8"))
        text = json.dumps(config, indent=2) + "\n"
        write_whole(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))

    tensors = {name: tensor.detach() for name, tensor in state.items()}
    shards = _cut(tensors, max_shard_bytes)
    if len(shards) == 1:
        _write_tensors(folder / WEIGHTS, tensors, describe)
        _forget(folder / INDEX)
    else:
        _write_shards(folder, shards, describe)
        _forget(folder / WEIGHTS)


def load(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> OmniMamba | MambaLM:
    """The model of a folder that ``save`` wrote, in evaluation mode, its weights bit for bit in their own dtypes.

    ``dtype`` casts the matrices (``cast_matrices``) as they are read, ``torch.int8`` afterwards. Raises CheckpointError
    that lists every missing, unknown or mis-shaped tensor, or each of an unfit dtype.
    """
    folder, device = Path(folder), usable(device)
    model_type, config = _read_config(folder)
    with torch.device("meta"):
        model = model_type(config)
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    tensors: dict[str, Tensor] = {}
    stored = None if dtype is torch.int8 else dtype
    with ExitStack() as stack:
        files = [stack.enter_context(_open(path, device)) for path in weight_files(folder)]
        for file in files:
            for name in file.keys():
                part = file.get_slice(name)
                if name in found:
                    raise CheckpointError(f"{folder}: two shards store {name}")
                found[name] = tuple(part.get_shape()), part.get_dtype()
        check_fit(model, {name: shape for name, (shape, _) in found.items()}, folder)
        check_dtypes({name: kind for name, (_, kind) in found.items()}, folder)
        for file in files:
            for name in file.keys():
                tensor = file.get_tensor(name)
                tensors[name] = tensor.to(stored) if stored is not None and tensor.ndim == 2 else tensor
    model.load_state_dict(tensors, assign=True)
    del tensors
    return (cast_matrices(model, dtype) if dtype is torch.int8 else model).eval()


def fingerprint(model: nn.Module) -> str:
    """Tells a model's weights from any others, in few bytes and a fraction of a second.

    It hangs on what no ``dtype`` of ``load``, no merge and no fold changes: all but the matrices, of which every stage
    of training moves some, and the adapters' signs.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "_lora_" not in name:
            continue
        told = parameter.detach().signbit() if parameter.ndim == 2 else parameter.detach()
        digest.update(name.encode())
        digest.update(told.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def usable(device: str | torch.device) -> torch.device:
    """The device. ValueError where it is no CPU or GPU, or not there."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu or cuda, got {device!r}: {str(error).splitlines()[0]}") from None
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if found.type == "cpu" and found.index:
        raise ValueError(f"device must be cpu or cuda, got {device!r}: there is one cpu")
    if found.type == "cuda" and not (found.index or 0) < torch.cuda.device_count():
        raise ValueError(f"device {device} is not there: torch finds {torch.cuda.device_count()} GPUs")
    return found


def weight_files(folder: Path, whole: str = WEIGHTS, index_name: str = INDEX) -> list[Path]:
    """The files that hold the weights: those that the index names, each in the folder itself, or the one file."""
    index, suffix = folder / index_name, Path(whole).suffix
    if not index.exists():
        return [folder / whole]
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted(set(names))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} must be an object with a weight_map of tensors to files: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffix):
            raise CheckpointError(f"{index}: weight_map must name {suffix} files beside it, got {name!r}")
    return [folder / name for name in names]


@contextmanager
def _open(path: Path, device: str | torch.device) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(absent(path)) from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _cut(tensors: dict[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """Tensors in their order, a new shard where the next would pass ``most`` bytes; a larger one stands alone."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write_shards(folder: Path, shards: list[dict[str, Tensor]], then: Callable[[], None]) -> None:
    """Under names that no earlier save used, so that its shards stay whole until the index names the new ones."""
    mark, count = secrets.token_hex(4), len(shards)
    names = [f"model-{mark}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    old = _shards(folder)
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
    try:
        for name, shard in zip(names, shards, strict=True):
            _write_tensors(folder / name, shard)
        then()
        write_whole(folder / INDEX, lambda path: path.write_text(index, encoding="utf-8"))
    except BaseException:  # Ctrl-C too, which may come when the index is there
        for name in {*names} - {path.name for path in _shards(folder)}:
            (folder / name).unlink(missing_ok=True)
        raise
    for path in old:
        path.unlink(missing_ok=True)


def _shards(folder: Path) -> list[Path]:
    """What a readable index names, so that it can be replaced; nothing where there is none."""
    try:
        return weight_files(folder) if (folder / INDEX).exists() else []
    except CheckpointError:
        return []


def _write_tensors(path: Path, tensors: dict[str, Tensor], then: Callable[[], None] = lambda: None) -> None:
    """``then`` is done once they are on disk, before they get their name."""
    whole = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}

    def fill(temporary: Path) -> None:
        save_file(whole, temporary, metadata={"format": "pt"})
        then()

    write_whole(path, fill)


def _forget(path: Path) -> None:
    """Remove weights in the other form, or an index with the shards that it names."""
    if path.name == INDEX and path.exists():
        shards = _shards(path.parent)
        path.unlink()
        for shard in shards:
            shard.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def read_tokenizer(folder: str | Path) -> str | None:
    """The text of the folder's tokenizer.json, or None where it has none."""
    path = Path(folder) / TOKENIZER
    try:
        return path.read_text(encoding="utf-8") if path.exists() else None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error}") from error


def _read_config(folder: Path) -> tuple[type[nn.Module], OmniMambaConfig | MambaConfig]:
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        told = f"{path} does not exist: {folder} is not a checkpoint of this package (omnimamba convert makes them)"
        raise CheckpointError(told) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    kind = values.pop("model_type", None) if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise CheckpointError(f"{path} must be an object whose model_type is one of {', '.join(_KINDS)}, got {kind!r}")
    model_type, config_type = _KINDS[kind]
    try:
        return model_type, config_type.from_dict(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def check_fit(model: nn.Module, found: dict[str, tuple[int, ...]], path: Path) -> None:
    """CheckpointError that lists each tensor of ``model`` that ``found`` lacks, has besides or otherwise shaped."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in found]
    problems += [f"unknown {name} {shape}" for name, shape in found.items() if name not in wanted]
    problems += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise CheckpointError(f"{path} does not fit its config:\n  " + "\n  ".join(problems))


def check_dtypes(found: Mapping[str, str], path: Path) -> None:
    """CheckpointError that lists each tensor of an unfit dtype, which ``found`` names as torch or safetensors do."""
    unfit = [f"{name} {dtype}" for name, dtype in found.items() if dtype not in (*_DTYPES, *_DTYPES.values())]
    if unfit:
        raise CheckpointError(f"{path}: weights must be {', '.join(_DTYPES.values())}, got {', '.join(unfit)}")
