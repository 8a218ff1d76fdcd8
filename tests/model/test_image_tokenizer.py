import pytest
import torch
from safetensors.torch import save_file

from omnimamba_model import CheckpointError
from omnimamba_model.image_tokenizer import PatchTokenizer, k_means, nearest


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(40, 4, 6, generator=seeded(1))


@pytest.fixture
def pixels(images) -> PatchTokenizer:
    return PatchTokenizer(16, 2, (4, 6)).fit(images, seeded())


def test_each_patch_becomes_its_nearest_code(pixels, images):
    tokens = pixels.encode(images)
    assert tokens.shape == (40, pixels.tokens) == (40, 6)
    patch = images[3, 2:4, 4:6].flatten()
    assert tokens[3, 5] == (pixels.codebook - patch).norm(dim=1).argmin()
    drawn = pixels.decode(tokens)
    assert torch.equal(drawn[3, 2:4, 4:6].flatten(), pixels.codebook[tokens[3, 5]])
    assert torch.equal(pixels.encode(drawn), tokens)


def test_images_of_codes_survive_exactly(pixels):
    tokens = torch.randint(16, (9, 6), generator=seeded())
    assert torch.equal(pixels.encode(pixels.decode(tokens)), tokens)


def test_features_see_each_patch_and_its_border(pixels, images):
    seen = pixels.features(images)
    assert seen.shape == (40, pixels.tokens, pixels.feature_dim) == (40, 6, 16)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    assert torch.equal(seen[7, 4].view(4, 4), 2 * padded[7, 2:6, 2:6] - 1)


def test_the_fit_depends_on_images_and_seed_alone(images):
    first, second, other = (PatchTokenizer(16, 2, (4, 6)).fit(images, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first.codebook, second.codebook)
    assert not torch.equal(first.codebook, other.codebook)


def test_k_means_ends_where_centres_are_means():
    points = torch.cat([torch.randn(50, 2, generator=seeded()) + shift for shift in (0, 20, 40)])
    centres = k_means(points, 3, seeded())
    member = nearest(points, centres)
    assert sorted(torch.bincount(member).tolist()) == [50, 50, 50]
    for i in range(3):
        torch.testing.assert_close(centres[i], points[member == i].mean(0))
    with pytest.raises(ValueError, match="needs 3 different points, got 2"):
        k_means(torch.tensor([[0.0], [1.0], [1.0]]), 3, seeded())


def test_saved_and_loaded_it_is_the_same(pixels, tmp_path):
    pixels.save(tmp_path)
    again = PatchTokenizer.load(tmp_path)
    assert (again.size, again.patch) == (pixels.size, pixels.patch)
    assert torch.equal(again.codebook, pixels.codebook)
    assert [path.name for path in tmp_path.iterdir()] == ["image_tokenizer.safetensors"]


def test_damaged_files_are_refused(pixels, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        PatchTokenizer.load(tmp_path)
    pixels.save(tmp_path)
    path = tmp_path / "image_tokenizer.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="is not an image tokenizer"):
        PatchTokenizer.load(tmp_path)
    codes, size = torch.zeros(4, 4), torch.tensor([8, 8])
    for codebook, stored, message in [
        (codes, None, "size"),
        (codes[0], size, "codebook must have shape"),
        (torch.zeros(4, 5), size, "codebook must have shape"),
        (codes[:0], size, "codes must be 1 or more, got 0"),
        (codes / 0, size, "codebook must hold finite"),
        (codes.long(), size, "codebook must hold finite"),
        (codes, torch.tensor(8), "size must be 2 whole numbers"),
        (codes, torch.tensor([8, 8, 8]), "size must be 2 whole numbers"),
        (codes, torch.tensor([8.0, 8.0]), "size must be 2 whole numbers"),
        (codes, torch.tensor([0, 8]), "divide the image size"),
        (codes, torch.tensor([-8, 8]), "divide the image size"),
    ]:
        save_file({"codebook": codebook} | ({} if stored is None else {"size": stored}), path)
        with pytest.raises(CheckpointError, match=f"is not an image tokenizer: .*{message}"):
            PatchTokenizer.load(tmp_path)


def test_wrong_sizes_are_named(pixels, images):
    with pytest.raises(ValueError, match=r"images must have shape \(b, 4, 6\), got \(40, 6, 4\)"):
        pixels.encode(images.transpose(1, 2))
    with pytest.raises(ValueError, match=r"patch must be even and divide the image size \(4, 6\), got 4"):
        PatchTokenizer(16, 4, (4, 6))
