"""Small data in every official format, both tokenizers, and settings for runs of a few steps."""

import json
from collections.abc import Iterator

import pytest
import torch
from formats import drawing, png, shard, understanding

from omnimamba_model import OmniMambaConfig
from omnimamba_model.config import MambaConfig
from omnimamba_model.image_tokenizer import PatchTokenizer
from omnimamba_model.text_tokenizer import SPECIAL, WordTokenizer

SAYINGS = ["in out a cat", "a small dog", "the red house", "what is this", "it shows a cat"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def words() -> WordTokenizer:
    return WordTokenizer.of_texts(SAYINGS)


@pytest.fixture
def pixels() -> PatchTokenizer:
    tokenizer = PatchTokenizer(16, 2, (4, 6))
    tokenizer.codebook.copy_(torch.rand(16, 4, generator=torch.Generator().manual_seed(0)))
    return tokenizer


@pytest.fixture
def config(words) -> OmniMambaConfig:
    backbone = MambaConfig(d_model=32, n_layer=2, vocab_size=words.vocab_size, d_state=8, headdim=16, chunk_size=16)
    return OmniMambaConfig(
        backbone=backbone, tokens=SPECIAL, image_vocab_size=16, image_tokens=6, text_slots=4, image_features=6,
        feature_dim=16, mmu_positions=40, mlp_ratio=2, lora_rank=2, lora_alpha=4.0, lora_dropout=0.0,
    )  # fmt: skip


@pytest.fixture
def data(tmp_path, words, pixels, config):
    """A folder with t2i.jsonl, mmu.json and its images, t2i.tar, mmu.tar, and both tokenizers."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "t2i.jsonl").write_text("".join(json.dumps(drawing(i)) + "\n" for i in range(11)))
    (folder / "mmu.json").write_text(json.dumps([understanding(i, 2 + 2 * (i % 2)) for i in range(7)], indent=1))
    for i in range(7):
        (folder / f"{i}.png").write_bytes(png(i))
    shard(folder / "t2i.tar", {f"{i:03}.json": json.dumps(drawing(i)).encode() for i in range(11)})
    pairs = {f"x/{i}.json": json.dumps(understanding(i, 2 + 2 * (i % 2))).encode() for i in range(7)}
    shard(folder / "mmu.tar", {**pairs, **{f"x/{i}.png": png(i) for i in range(7)}})
    (folder / "tokenizer.json").write_text(words.to_json())
    pixels.save(folder)
    return folder


@pytest.fixture
def values(tmp_path, data, config) -> dict:
    """Settings of a run, as YAML would give them."""
    return {
        "out": str(tmp_path / "run"), "stage": "joint", "steps": 6, "learning_rate": 0.01, "seed": 3,
        "fresh": config.to_dict(), "tokenizers": str(data), "save_every": 2, "keep": 2, "device": "cpu", "threads": 1,
        "tensorboard": False,
        "t2i": {"files": [str(data / "t2i.jsonl")], "batch": 4, "caption_dropout": 0.2},
        "mmu": {"files": [str(data / "mmu.json")], "batch": 2, "images": str(data), "text_length": 24},
    }  # fmt: skip
