"""Records, pictures and shards in the official formats."""

import io
import tarfile

import numpy as np
from PIL import Image


def png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 6), dtype=np.uint8)).save(out, format="PNG")
    return out.getvalue()


def drawing(i: int) -> dict:
    tokens = np.random.default_rng(i).integers(0, 16, 6).tolist()
    return {"captions": ["a cat", "the red house", "a small dog"][: 1 + i % 3], "tokens": tokens}


def understanding(i: int, turns: int = 2) -> dict:
    asked = {"from": "human", "value": "what is this\n<image>"}
    return {"image": f"{i}.png", "conversations": [asked, {"from": "gpt", "value": "it shows a cat"}] * (turns // 2)}


def shard(path, samples: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
