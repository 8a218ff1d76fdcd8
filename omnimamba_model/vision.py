"""What the published model looks through: DINOv2 with registers beside SigLIP, both frozen.

Each sees the picture at 384 x 384 under its own normalisation and gives 27 x 27 = 729 patches; of each the output of
the second-to-last block is taken, without the tokens that stand before the patches and without a last norm, and both
are laid side by side, DINOv2 first: 1024 + 1152 = 2176 numbers a patch (arXiv 2503.08686, section 3.1; Cobra, arXiv
2403.14520).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .pictures import plain

DINO, SIGLIP = "facebook/dinov2-with-registers-large", "google/siglip-so400m-patch14-384"
_DINO_MEAN, _DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIGLIP_MEAN, _SIGLIP_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


class VisionEncoder(nn.Module):
    """``look`` at pictures, or call it on tensors (b, 3, size, size) in [0, 1]: (b, patches, feature_dim)."""

    def __init__(self, dino: nn.Module, siglip: nn.Module, size: int = 384) -> None:
        super().__init__()
        self.dino, self.siglip, self.size = dino.eval(), siglip.eval(), size
        sides = [size // part.config.patch_size for part in (dino, siglip)]
        if sides[0] != sides[1]:
            raise ValueError(f"both encoders must cut {size} pixels into as many patches, got {sides}")
        self.patches = sides[0] ** 2
        self.feature_dim = dino.config.hidden_size + siglip.config.hidden_size
        self.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, dino: str | Path = DINO, siglip: str | Path = SIGLIP, **options: Any) -> VisionEncoder:
        """Both encoders from local folders or the hub; ``options`` go to transformers' from_pretrained."""
        library = _library()
        seen = library.SiglipVisionModel.from_pretrained(siglip, **options)
        return cls(library.Dinov2WithRegistersModel.from_pretrained(dino, **options), seen, seen.config.image_size)

    def look(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures of any size, resized without regard to their sides' ratio: (b, patches, feature_dim)."""
        shape = (self.size, self.size)
        pixels = [np.array(plain(image).convert("RGB").resize(shape, Image.Resampling.BICUBIC)) for image in images]
        device = next(self.parameters()).device
        return self(torch.from_numpy(np.stack(pixels)).to(device).permute(0, 3, 1, 2) / 255)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, self.size, self.size):
            raise ValueError(f"images must have shape (b, 3, {self.size}, {self.size}), got {tuple(images.shape)}")
        before = 1 + self.dino.config.num_register_tokens
        dino = self.dino(_normal(images, _DINO_MEAN, _DINO_STD, self.dino.dtype), output_hidden_states=True)
        siglip = self.siglip(_normal(images, _SIGLIP_MEAN, _SIGLIP_STD, self.siglip.dtype), output_hidden_states=True)
        return torch.cat([dino.hidden_states[-2][:, before:], siglip.hidden_states[-2]], dim=-1)


def feature_sizes(dino: str | Path, siglip: str | Path) -> dict[str, int]:
    """The fields of OmniMambaConfig that both encoders set, from their config.json alone, in a folder or on the hub.

    OSError where one is not there; ValueError where one is of another kind, or they cut a picture differently.
    """
    library, found = _library(), []
    for place, kind, names in (
        (dino, library.Dinov2WithRegistersConfig, ("dinov2_with_registers",)),
        (siglip, library.SiglipVisionConfig, ("siglip", "siglip_vision_model")),
    ):
        values, _ = kind.get_config_dict(place)
        if values.get("model_type") not in names:
            raise ValueError(f"{place} must hold a {names[0]}, got {values.get('model_type')!r}")
        found.append(kind.from_pretrained(place))
    size = found[1].image_size
    sides = [size // config.patch_size for config in found]
    if sides[0] != sides[1]:
        raise ValueError(f"both encoders must cut {size} pixels into as many patches, got {sides}")
    return {"image_features": sides[0] ** 2, "feature_dim": sum(config.hidden_size for config in found)}


def _library() -> Any:
    try:
        import transformers
    except ImportError:
        raise ImportError("to look at pictures as the published model does: pip install transformers") from None
    return transformers


def _normal(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    middle, spread = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    return ((images - middle) / spread).to(dtype)
