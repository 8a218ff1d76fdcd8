import fnmatch
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from omnimamba_model import MambaConfig, MambaLM, OmniMamba, OmniMambaConfig, save
from omnimamba_model.image_tokenizer import PatchTokenizer
from omnimamba_model.text_tokenizer import WordTokenizer


@pytest.fixture
def config() -> OmniMambaConfig:
    return OmniMambaConfig.preset("tiny")


@pytest.fixture
def model(config) -> OmniMamba:
    """A tiny OmniMamba in which every path is loud enough to be heard, the adapters too."""
    torch.manual_seed(0)
    model = OmniMamba(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_lora_B0" in name:
                parameter.normal_(std=0.1)
            elif "embed" in name:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture
def lm() -> MambaLM:
    torch.manual_seed(0)
    return MambaLM(MambaConfig.preset("tiny", ngroups=2)).eval()


@pytest.fixture
def transformers_lm(tmp_path):
    """transformers' own Mamba-2, small and random, also written to tmp_path / "lm"."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(num_heads=4, head_dim=16, vocab_size=64, hidden_size=32, state_size=16, num_hidden_layers=2)
    config = transformers.Mamba2Config(n_groups=1, chunk_size=16, tie_word_embeddings=True, **sizes)
    theirs = transformers.Mamba2ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "lm")
    return theirs


@pytest.fixture
def caption(config) -> torch.Tensor:
    pad = config.tokens.pad
    return torch.tensor([[pad, pad, 10, 11, 12], [pad, 20, 21, 22, 23], [30, 31, 32, 33, 34]])


@pytest.fixture
def image(config) -> torch.Tensor:
    return torch.randint(config.image_vocab_size, (3, config.image_tokens), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def features(config) -> torch.Tensor:
    return torch.randn(3, config.image_features, config.feature_dim, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def text(config) -> torch.Tensor:
    ids = torch.randint(8, config.backbone.vocab_size, (3, 7), generator=torch.Generator().manual_seed(3))
    ids[0, 5:] = config.tokens.pad
    return ids


@pytest.fixture
def folder(tmp_path):
    """A small checkpoint with both tokenizers, and a picture, a.png."""
    torch.manual_seed(0)
    words = WordTokenizer(["in", "out", *(f"word{i}" for i in range(54))])
    sizes = dict(image_vocab_size=16, image_tokens=6, image_features=6, feature_dim=16)
    save(OmniMamba(OmniMambaConfig.preset("tiny", **sizes)), tmp_path, words.to_json())
    PatchTokenizer(16, 2, (4, 6)).save(tmp_path)
    Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6)).save(tmp_path / "a.png")
    return tmp_path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose repositories are folders in tmp_path/hub/OWNER; only the files that are asked for come down."""
    library = pytest.importorskip("huggingface_hub")

    def snapshot_download(name, *, revision, allow_patterns, local_files_only):
        if revision is not None or local_files_only:
            raise FileNotFoundError(f"{name} at {revision}, {local_files_only=}")
        source, target = tmp_path / "hub" / name, tmp_path / "cache" / name
        target.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, target)
        return str(target)

    monkeypatch.setattr(library, "snapshot_download", snapshot_download)
    return tmp_path / "hub"


@pytest.fixture
def official(tmp_path):
    """A small model as the official release stores it, and the folder that holds it alone."""
    torch.manual_seed(0)
    sizes = dict(image_vocab_size=40, feature_dim=12, mmu_positions=800, lora_rank=4)
    model = OmniMamba(OmniMambaConfig(MambaConfig(d_model=32, n_layer=2, d_state=16, headdim=16), **sizes)).half()
    names = {n: n if n.startswith("projector.") else f"llm_backbone.mamba.{n}" for n in model.state_dict()}
    (tmp_path / "release").mkdir()
    torch.save({names[n]: t for n, t in model.state_dict().items()}, tmp_path / "release" / "OmniMamba-1.3b.pth")
    return model.eval(), tmp_path / "release"
